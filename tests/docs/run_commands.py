"""Runs the marked blocks of shell of a page as they are written, one after the other.

    python tests/docs/run_commands.py docs/getting-started.md cpu
    python tests/docs/run_commands.py docs/getting-started.md install cpu --fresh

A block is marked by ``<!-- commands: NAME -->`` on the line above it. The blocks of the names that
are given are one shell session: variables stay, what was started in the background is ended, and
the first command that fails ends it with its own status. It works on a copy of the repository's
files, so nothing is left in the checkout.

Without ``--fresh``, ``python`` and ``cartridge-distill`` are this Python's. With it there is
nothing but what the blocks themselves install.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.docs.pages import marked_blocks  # noqa: E402


def clone(folder: Path) -> Path:
    """The repository's files in ``folder``, as git knows them, changed and new ones included."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    target = folder / "clone"
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():  # a file may be deleted and not committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def commands_on_path(folder: Path, python: str = sys.executable) -> Path:
    """A folder for PATH, as an activated environment has it: python and cartridge-distill."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, arguments in (
        ("python", ""),
        ("cartridge-distill", " -m cartridge_distill.cli.main"),
    ):
        file = folder / name
        file.write_text(f'#!/bin/sh\nexec "{python}"{arguments} "$@"\n', encoding="utf-8")
        file.chmod(0o755)
    return folder


def without_this_python() -> dict[str, str]:
    """The environment of somebody who has not activated any."""
    own = {str(Path(sys.executable).parent), str(Path(sys.prefix) / "bin")}
    kept = [part for part in os.environ["PATH"].split(os.pathsep) if part not in own]
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PATH", "MAKEFLAGS", "MAKELEVEL")
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    return inherited | {"PATH": os.pathsep.join(kept)}


def run(
    page: Path,
    names: str | Sequence[str],
    folder: Path,
    log: Path | None = None,
    fresh: bool = False,
) -> int:
    """Runs the blocks in a clone below ``folder``; returns the exit status of the session.

    Args:
        names: of the blocks, in the order in which they are run.
        log: gets what they say; None shows it.
        fresh: this Python, and what is installed for it, is not on the path.

    Raises:
        ValueError: the page has no block of a name.
    """
    blocks: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        found = marked_blocks(page, name)
        if not found:
            raise ValueError(f"{page} has no block marked <!-- commands: {name} -->")
        blocks += found
    work = clone(folder)
    if fresh:
        environment = without_this_python()
    else:
        path = commands_on_path(folder / "bin")
        environment = {
            **os.environ,
            "PATH": f"{path}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(work),
        }
    script = "\n".join(["set -euo pipefail", "set -x", *blocks])
    with open(log, "wb") if log else nullcontext() as out:
        # A session of its own: what the blocks leave in the background is ended with it.
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait()
        finally:
            _end(process.pid)


def _end(group: int) -> None:
    """Ends what is left of a session, gently: servers end their children."""
    for sent, patience in ((signal.SIGTERM, 30.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(group, sent)
        except ProcessLookupError:
            return
        waited = 0.0
        while waited < patience:
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)
            waited += 0.1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path)
    parser.add_argument("names", nargs="+", metavar="name")
    parser.add_argument("--fresh", action="store_true", help="with nothing installed beforehand")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        return run(options.page, options.names, Path(folder), fresh=options.fresh)


if __name__ == "__main__":
    sys.exit(main())
