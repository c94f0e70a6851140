"""Comparing results and measuring work, for the benchmarks: seconds, tokens/s, peak memory.

Knows nothing about cartridges. Results are compared before anything is timed; jobs take turns.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.processes import say

TOLERANCE = 1e-4
_GIB = 1024**3


def disagreement(
    one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]
) -> tuple[float, float]:
    """Largest difference of log-probs, and of gradients relative to the largest gradient."""
    logprobs = (one[0] - other[0]).abs().max().item()
    pairs = list(zip(one[1], other[1], strict=True))
    largest = max((a.abs().max().item() for a, _ in pairs), default=1.0)
    gradients = max(((a - b).abs().max().item() for a, b in pairs), default=0.0)
    return logprobs, gradients / largest


def check(
    what: str,
    names: Sequence[str],
    results: Sequence[tuple[Tensor, list[Tensor]]],
    tolerance: float = TOLERANCE,
) -> tuple[float, float]:
    """Every result against the last one, which is the plainest.

    Returns:
        The largest :func:`disagreement` of all.

    Raises:
        ConfigError: two ways disagree; a time of something else would mean nothing.
    """
    worst = [0.0, 0.0]
    for name, result in zip(names[:-1], results[:-1], strict=True):
        found = disagreement(results[-1], result)
        worst = [max(pair) for pair in zip(worst, found, strict=True)]
        if not max(found) <= tolerance:
            raise ConfigError(
                f"{what}: {name!r} and {names[-1]!r} differ by {found[0]:.1e} in log-probs, "
                f"{found[1]:.1e} in gradients, over {tolerance:g}; nothing was timed"
            )
    say(
        f"   {what}: {len(names)} ways agree in float32, log-probs to {worst[0]:.0e}"
        + (f", gradients to {worst[1]:.0e} of the largest" if results[0][1] else "")
    )
    return worst[0], worst[1]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Peak memory between :meth:`start` and :meth:`stop`, beyond what was held at the start."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = 0
        # Linux lets a process reset the high-water mark of its own resident memory.
        self._reset = Path("/proc/self/clear_refs")

    def _resident(self, field: str) -> int | None:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        sizes = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
        return int(sizes[0]) * 1024 if sizes else None

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return
        try:
            # Else what earlier work freed, and the allocator kept, would hide what this one takes.
            ctypes.CDLL(None).malloc_trim(0)
            self._reset.write_text("5")
        except (OSError, AttributeError, TypeError):
            self._before = -1  # not Linux with glibc, or not allowed: nothing is claimed
            return
        self._before = self._resident("VmRSS") or -1

    @property
    def held(self) -> float | None:
        """GiB held at the start; None where it cannot be measured."""
        return None if self._before < 0 else self._before / _GIB

    def stop(self) -> float | None:
        """GiB; None where it cannot be measured."""
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self._before) / _GIB
        peak = self._resident("VmHWM")
        if self._before < 0 or peak is None:
            return None
        return max(0, peak - self._before) / _GIB


@dataclass(frozen=True)
class Job:
    """One row of a table: what is timed, and how many tokens it works off."""

    name: str
    work: Callable[[], object]
    tokens: int


@dataclass(frozen=True)
class Measured:
    """One row of a table: the median of its seconds, with the shortest and the longest."""

    name: str
    seconds: float
    tokens: int
    peak_gib: float | None
    shortest: float
    longest: float


def measure(
    jobs: Sequence[Job],
    repeats: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Measured]:
    """Median seconds of ``repeats`` rounds; the jobs take turns, so that a machine which is busy
    for a while is busy for all of them.

    Every job ran once before, when it was checked; a GPU compiles its kernels anew for another
    dtype, so there one more round is not counted. A job for which its memory does not suffice is
    left out, and that is said.

    Args:
        clock: with ``time.process_time`` seconds are those of this process' threads, of which other
            processes on the machine take none.

    Raises:
        ConfigError: memory suffices for none of them.
    """
    if device.type == "cuda":
        jobs = [job for job in jobs if _fits(job)]
    if not jobs:
        raise ConfigError("the GPU's memory suffices for no way; take fewer or shorter sequences")
    memory = PeakMemory(device)
    times: list[list[float]] = [[] for _ in jobs]
    peaks: list[list[float | None]] = [[] for _ in jobs]
    for number in range(1, repeats + 1):
        for job, seconds, peak in zip(jobs, times, peaks, strict=True):
            memory.start()
            synchronize(device)
            start = clock()
            job.work()
            synchronize(device)
            seconds.append(clock() - start)
            peak.append(memory.stop())
            say(f"   ... {number}/{repeats} {job.name}: {seconds[-1]:.3f} s")
    return [
        Measured(
            job.name,
            statistics.median(seconds),
            job.tokens,
            max((p for p in peak if p is not None), default=None),
            min(seconds),
            max(seconds),
        )
        for job, seconds, peak in zip(jobs, times, peaks, strict=True)
    ]


def _fits(job: Job) -> bool:
    try:
        job.work()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        say(f"   left out: {job.name} (the GPU's memory does not suffice)")
        return False
    return True


def print_rows(title: str, rows: Sequence[Measured]) -> None:
    """The first row is ours; the ratio says how many times longer a row takes than it."""
    say(f"\n{title}")
    say(f"   {'':<34}{'seconds':>9}{'tokens/s':>10}{'ratio':>8}{'peak GiB':>10}{'from - to':>16}")
    for row in rows:
        peak = "-" if row.peak_gib is None else f"+{row.peak_gib:.2f}"
        say(
            f"   {row.name:<34}{row.seconds:>9.3f}{row.tokens / row.seconds:>10.0f}"
            f"{row.seconds / rows[0].seconds:>7.2f}x{peak:>10}"
            f"{f'{row.shortest:.3f} - {row.longest:.3f}':>16}"
        )


def verdict(figure: float, aim: float, unit: str) -> str:
    """A figure beside its aim, for a printed table."""
    return f"(aim: under {aim:g}{unit}; {'met' if figure < aim else 'missed'})"
