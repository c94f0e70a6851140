"""A bound on the memory that some lines of code may take.

For libraries that read what a stranger wrote: what a file says about its own size may be a lie, and
the library believes it. The kernel does not: it counts what the process holds, and gives no more.
"""

from __future__ import annotations

import re
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS = Path("/proc/self/status")
_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def bounded_memory(num_bytes: int) -> Iterator[None]:
    """This process gets ``num_bytes`` more memory within, at most; then there is a MemoryError.

    What other threads take meanwhile counts too, and a process that one of them starts keeps the
    bound: not in a process whose other threads do either. On a system other than Linux nothing is
    bounded.

    Raises:
        MemoryError: it was not enough; or an error of a library that makes one of it.
    """
    held = _held_bytes()
    if held is None:
        yield
        return
    with _ONE_AT_A_TIME:  # two of them would put each other's limit back
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = held + num_bytes
        for lower in (soft, hard):
            limit = limit if lower == resource.RLIM_INFINITY else min(limit, lower)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _held_bytes() -> int | None:
    """What counts towards the limit now: private memory that can be written to."""
    try:
        found = re.search(r"^VmData:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
