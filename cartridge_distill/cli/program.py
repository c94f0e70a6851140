"""How every command behaves: errors in one form, exit statuses, other processes.

A person reads ``error: what; fix: how`` whatever was foreseen: a mistyped command, an option or a
file. A stack is for the rest.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar

import typer

from cartridge_distill.util.errors import CartridgeDistillError
from cartridge_distill.util.secrecy import clean_text
from cartridge_distill.util.shown_text import printable
from cartridge_distill.util.standard_output import guard_output

P = ParamSpec("P")
R = TypeVar("R")


class Commands(typer.Typer):
    """Typer's, whose usage errors have the one form of all others."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The program: ends the process with the command's status."""
        guard_output()
        try:
            status = typer.main.get_command(self)(*args, standalone_mode=False, **kwargs)
        except Exception as error:
            # A usage error; typer has them from click, or from its own copy of it.
            if not hasattr(error, "format_message"):
                raise
            echo(f"error: {_usage(error)}", err=True)
            sys.exit(getattr(error, "exit_code", 2))
        except KeyboardInterrupt:
            sys.exit(130)
        sys.exit(status if isinstance(status, int) else 0)


def echo(text: str, err: bool = False) -> None:
    """A line for a person; what others wrote in it moves nothing."""
    typer.echo(printable(text), err=err)


def _usage(error: Any) -> str:
    """What was typed wrong, with the fix."""
    said = " ".join(error.format_message().split()).rstrip(".")
    said = re.sub(r" \(Possible options: (.*)\)$", r" Did you mean \1?", said)
    what, meant, near = said.partition(" Did you mean ")
    if meant:
        return f"{what.rstrip('.')}; fix: did you mean {near}"
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "cartridge-distill"
    return f"{what}; fix: see `{command} --help`"


def one_form(command: Callable[P, R]) -> Callable[P, R]:
    """What goes wrong on purpose is one line and exit status 1, not a stack."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (CartridgeDistillError, OSError) as error:
            echo(clean_text(f"error: {error}"), err=True)
            raise typer.Exit(1) from None

    return run


def become(module: str, arguments: list[str]) -> NoReturn:
    """Goes on as another module's process: Ctrl-C and the exit status are then its own.

    The core does not import what ties it to veRL.
    """
    sys.stdout.flush()
    safe = ["-P"] if sys.flags.safe_path else []
    os.execv(sys.executable, [sys.executable, *safe, "-m", module, *arguments])
