"""Standard output that cannot be written to ends a program in one line, wherever it was printing.

A full disk behind ``> file``, a closed descriptor, or a reader such as ``head`` that has seen
enough: print() raises then in the middle of whatever the program does, argparse swallows the error
and the help is lost, and at the end Python reports what was left in a buffer with a stack.
"""

from __future__ import annotations

import atexit
import io
import os
import sys
from typing import Any, NoReturn

_DESCRIPTOR = 1


def guard_output() -> None:
    """From here on a failed write to standard output ends the program with exit status 1.

    One line on standard error says why. A reader that has closed its pipe wants no more, and is
    told nothing. Characters that the output's encoding does not have are written as escapes.
    Nothing changes where standard output is not the process's own, as under a test's capture.
    Calling it again does nothing.

    Raises:
        SystemExit: standard output is closed already.
    """
    if sys.stdout is None:  # what is opened next would have its descriptor, and all that is printed
        _say("it is closed")
        raise SystemExit(1)
    given = sys.stdout
    if given is not sys.__stdout__ or not isinstance(given, io.TextIOWrapper):
        return
    try:
        if given.fileno() != _DESCRIPTOR:
            return
    except (OSError, ValueError):
        return
    given.flush()
    raw = _Raw(_DESCRIPTOR, "wb", closefd=False)
    # With PYTHONUNBUFFERED nothing is kept back, and a newline must not come after a later error.
    keeps: Any = raw if given.write_through else io.BufferedWriter(raw)
    sys.stdout = io.TextIOWrapper(
        keeps,
        encoding=given.encoding,
        errors="backslashreplace",
        line_buffering=given.line_buffering,
        write_through=given.write_through,
    )
    atexit.register(_flush)


class _Raw(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            _give_up(error)


def _give_up(error: OSError) -> NoReturn:
    # What is left in buffers, and threads that go on printing, must not fail once more.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, _DESCRIPTOR)
    os.close(nowhere)
    if not isinstance(error, BrokenPipeError):
        _say(error.strerror or type(error).__name__)
    raise SystemExit(1)


def _say(why: str) -> None:
    print(
        f"error: standard output cannot be written to ({why}); fix: send it to a place that has "
        "room, or to /dev/null",
        file=sys.stderr,
    )


def _flush() -> None:
    """The last chance: what is said during Python's own end changes no exit status."""
    try:
        sys.stdout.flush()
    except SystemExit:
        sys.stderr.flush()
        os._exit(1)
    except ValueError:  # somebody closed it
        pass
