"""The phases of a training step, and the file in which a run says when each began.

One line a mark: seconds since the epoch, step, phase. ``kill_marks`` writes it inside the run,
``kill_harness`` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MARKS_VARIABLE = "CARTRIDGE_KILL_MARKS"

# A phase lasts until the next one begins. "record" is the time after the sync was handed over:
# metrics, loggers, and the upload, which goes on in a thread of the training worker.
PHASES = ("rollout", "update", "save", "sync", "record")
BEFORE = "start"  # of a run: imports, models, the first version


@dataclass(frozen=True)
class Mark:
    """``phase`` of ``step`` began at ``when``."""

    when: float
    step: int
    phase: str


def read_marks(file: Path) -> list[Mark]:
    """All whole lines so far; none when there is no file yet."""
    if not file.exists():
        return []
    lines = file.read_text().split("\n")[:-1]
    split = [line.split() for line in lines]
    return [Mark(float(when), int(step), phase) for when, step, phase in split]


def phase_at(marks: list[Mark], when: float) -> tuple[int, str]:
    """The step and phase of that moment; ``(0, "start")`` before the first mark."""
    before = [mark for mark in marks if mark.when <= when]
    return (before[-1].step, before[-1].phase) if before else (0, BEFORE)
