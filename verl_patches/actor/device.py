"""What the host learns from the device, and when: in one transfer, and seconds without waiting."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def fetch(values: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Scalars and short vectors of a device as numbers, in one transfer.

    The host waits once, however many there are.
    """
    flat = [value.detach().double().reshape(-1) for value in values.values()]
    numbers = iter(torch.cat(flat).tolist())
    return {
        name: [next(numbers) for _ in range(part.numel())]
        for name, part in zip(values, flat, strict=True)
    }


class StageSeconds:
    """Seconds by stage. A GPU's are read from its own clock, so that no stage waits for it."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Around a stage; the same name again adds to it."""
        if torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((stage, begin, end))
            return
        start = time.perf_counter()
        yield
        self._seconds[stage] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """What was measured since the last call. Waits for the last stage to end."""
        for stage, begin, end in self._events:
            end.synchronize()
            self._seconds[stage] += begin.elapsed_time(end) / 1000
        found = dict(self._seconds)
        self._events.clear()
        self._seconds.clear()
        return found
