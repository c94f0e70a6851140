"""Memory for tensors of megabytes of which there is one set per version.

What a process gives back to the system, it gets back page by page as it touches it: that takes
several times longer than the copy that fills it. So the memory of a tensor from here is kept when
its last view is gone, and is the next one's of that size. At most :data:`KEPT_BYTES` of it lie
idle; they are those of the version before.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

KEPT_BYTES = 2**30
_SMALLEST = 2**20

_lock = threading.RLock()  # again by the same thread, when the collector runs in the middle
_idle: list[mmap.mmap] = []


def recycled_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor on the CPU."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < _SMALLEST:
        return torch.empty(*shape, dtype=dtype)
    # The tensor holds this view, so it dies when nothing can read or write the memory any more.
    block = _take(size)
    view = memoryview(block)
    weakref.finalize(view, _give_back, block).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=count).view(*shape)


def idle_bytes() -> int:
    """Memory that waits for the next tensor."""
    with _lock:
        return sum(map(len, _idle))


def _take(size: int) -> mmap.mmap:
    with _lock:
        for place, block in enumerate(_idle):
            if len(block) == size:
                return _idle.pop(place)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _give_back(block: mmap.mmap) -> None:
    with _lock:
        _idle.append(block)
        while idle_bytes() > KEPT_BYTES:
            _idle.pop(0)  # of sizes that nobody asks for any more
