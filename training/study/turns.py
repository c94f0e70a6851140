"""Several processes, one study: whoever holds a file's lock does what it stands for.

The lock goes with the process, so one that was killed leaves nothing to clean up.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from cartridge_distill.util.processes import say

Work = TypeVar("Work", bound=Hashable)


@contextmanager
def alone(file: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a lock, and says whether it could.

    Args:
        file: of the lock; it is made where it is missing, and stays.
        wait: until another process lets it go; without, False says that one holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def share(pieces: Sequence[Work], lock: Callable[[Work], Path], do: Callable[[Work], None]) -> None:
    """Does every piece of work, or sees to it that another process has done it.

    Args:
        pieces: in the order in which they are begun.
        lock: a piece's lock file.
        do: does one; finds by itself that it was done before.
    """
    left = list(pieces)
    while left:
        others = []
        for piece in left:
            with alone(lock(piece), wait=False) as mine:
                if mine:
                    do(piece)
                else:
                    others.append(piece)
        if others:  # the process that has it may be killed: then it is ours after all
            say(f"== {len(others)} left, which other processes are at work on: waiting")
            with alone(lock(others[0])):
                pass
        left = others
