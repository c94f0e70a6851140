"""Triton beside a build of torch that has none, to compile with; nothing can be launched.

A CUDA build of torch brings its Triton, a CPU build does not ask for it. The version that belongs
to a torch is installed once, into the cache directory, not into the environment.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from cartridge_distill.model.demo_model import cache_dir
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.processes import say

# What the CUDA builds of torch on the package index require.
_TRITON_OF_TORCH = {
    "2.9.0": "3.5.0",
    "2.9.1": "3.5.1",
    "2.10.0": "3.6.0",
    "2.11.0": "3.6.0",
    "2.12.0": "3.7.0",
    "2.12.1": "3.7.1",
    "2.13.0": "3.7.1",
}


def start_again_with_triton(arguments: Sequence[str]) -> None:
    """Returns where there is a Triton; otherwise runs ``arguments`` in this process's place.

    Triton is installed first, when it has not been. Python starts anew because torch and
    transformers look for a Triton while they are imported, and keep the answer.

    Raises:
        ConfigError: another platform than Linux on x86-64, an unknown torch, or pip failed.
    """
    if importlib.util.find_spec("triton") is not None:
        return
    folder = triton_folder()
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    os.execve(sys.executable, [sys.executable, *arguments], environment)


def triton_folder() -> Path:
    """Where the Triton of this torch lies; installed on the first call (200 MB)."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ConfigError(
            f"Triton exists for Linux on x86-64; this is {sys.platform} on {platform.machine()}"
        )
    release = torch.__version__.split("+")[0]
    if release not in _TRITON_OF_TORCH:
        raise ConfigError(
            f"which Triton belongs to torch {release} is not known here; install it yourself "
            f"(pip install triton==...), or use a torch of {', '.join(_TRITON_OF_TORCH)}"
        )
    version = _TRITON_OF_TORCH[release]
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache_dir() / f"triton-{version}-{python}"
    if not folder.is_dir():
        say(f"Triton {version} for torch {release} is installed once, about 200 MB: {folder}")
        _install(version, folder)
    return folder


def _install(version: str, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".triton-") as made:
        target = Path(made) / "packages"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--target", str(target), f"triton=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise ConfigError(
                f"Triton {version} cannot be installed: {lines[-1] if lines else 'pip failed'}. "
                f"Install it yourself: {' '.join(command[:-2])} {folder} {command[-1]}"
            )
        # Another process may have been faster; its folder is as good.
        if not folder.is_dir():
            os.replace(target, folder)
