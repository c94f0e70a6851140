"""The next command, ready to paste: how this project's own program is called here."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from cartridge_distill.util.processes import MARK

PROGRAM = "cartridge-distill"


def program() -> str:
    """``cartridge-distill`` as a person would type it here, quoted for a shell.

    By its name where the PATH leads to this environment's; else its path; else the module.
    """
    beside = Path(sys.executable).parent / PROGRAM
    found = shutil.which(PROGRAM)
    if found is not None and Path(found).resolve() == beside.resolve():
        return PROGRAM
    if beside.is_file():
        return shlex.quote(shorter(beside))
    return f"{shlex.quote(shorter(Path(sys.executable)))} -m cartridge_distill.cli.main"


def shorter(path: Path) -> str:
    """A path as seen from the working directory when it lies below it, else as it is."""
    here = Path.cwd()
    return os.path.relpath(path, here) if path.is_relative_to(here) else str(path)


def say_next(*commands: str) -> None:
    """Prints what may be done next; nothing in a stage of another command, which has its own."""
    if MARK not in os.environ:
        print("\nnext:", *(f"  {command}" for command in commands), sep="\n", flush=True)


def next_command(command: str, *arguments: object) -> str:
    """``program()`` with a command and its arguments, which are quoted where they must be."""
    return " ".join([program(), command, *(shlex.quote(str(argument)) for argument in arguments)])
