"""What an evaluation says while it works: stages with their seconds, and how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from cartridge_distill.util.shown_text import printable

_REPORT_SECONDS = 10.0


def say(line: str) -> None:
    """A line for the user, beside the table on standard output."""
    print(printable(line), file=sys.stderr, flush=True)


class Stage:
    """Says what is being done, and how long it took."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        say(f"{self._what} ...")
        self._start = time.monotonic()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            say(f"{self._what}: {time.monotonic() - self._start:.1f} s")


def heard() -> Callable[[int], None]:
    """Says every few seconds how many tokens were generated: an answer can take minutes."""
    start = said = time.monotonic()
    total = 0

    def count(tokens: int) -> None:
        nonlocal said, total
        total += tokens
        now = time.monotonic()
        if now - said >= _REPORT_SECONDS:
            said = now
            say(f"generating answers: {total} tokens so far ({now - start:.0f} s)")

    return count


def terminal_progress(what: str = "evaluating") -> Callable[[int, int], None]:
    """A line on stderr every tenth of the way; on a terminal it overwrites itself."""
    start, shown = time.monotonic(), -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        if done < total and done * 10 // total == shown:
            return
        shown = done * 10 // total
        end = "\r" if sys.stderr.isatty() and done < total else "\n"
        line = f"{what}: {done * 100 // total} % ({time.monotonic() - start:.0f} s)"
        print(line, end=end, file=sys.stderr, flush=True)

    return show
