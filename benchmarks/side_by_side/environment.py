"""The alternatives' environment: what is in it, making it, and running a child in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.side_by_side.plain import Outcome
from cartridge_distill.util.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

# With transformers 5.24 PEFT's `generate` ignores a CARTRIDGE adapter with no more than a warning.
PINNED = (
    "transformers==5.10.4",
    "peft==0.21.2",
    "accelerate==1.15.0",
    "trl==1.16.0",
    "datasets==5.2.0",
)
# By itself and first: for another package's sake pip would take the build for CUDA. With its local
# version, an index that has no CPU build has none that fits.
TORCH = "torch==2.13.0+cpu"
CPU_INDEX = "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"


def make(folder: Path) -> Path:
    """Makes the environment.

    Returns:
        Its Python.

    Raises:
        ConfigError: it is there, or a package cannot be had.
    """
    if folder.exists():
        raise ConfigError(f"--make-environment {folder}: it is there; fix: name a new folder")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    for packages in ([TORCH], PINNED):
        done = subprocess.run([*pip, *packages])
        if done.returncode:
            raise ConfigError(
                f"--make-environment {folder}: pip could not install {', '.join(packages)}, see "
                f"above; fix: remove the folder and try again with {CPU_INDEX}"
            )
    return python


def run(python: Path, module: str, work: Path, way: str, log: Path) -> Outcome:
    """A child on the work; its own output goes to ``log``.

    Raises:
        ConfigError: it ended without a result.
    """
    command = [str(python), "-m", f"benchmarks.side_by_side.{module}", str(work), way]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = "\n".join(log.read_text().strip().splitlines()[-12:])
        raise ConfigError(
            f"{way} ended with status {done.returncode} in {python}:\n{last}\nfix: make the "
            "environment with --make-environment DIR, or leave the way out with --only"
        )
    return Outcome(**json.loads(lines[-1]))


def find(python: Path | None) -> Path:
    """The Python that children run in: the one named, else this one where it has PEFT.

    Raises:
        ConfigError: neither.
    """
    if python is not None:
        if not python.is_file():
            raise ConfigError(f"--alternatives-python {python}: there is no such file")
        return python
    return Path(sys.executable)
