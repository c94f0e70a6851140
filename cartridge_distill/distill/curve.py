"""The training curve as a cartridge carries it: one row a step, thinned out when there are many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MOST_ROWS = 128
_DIGITS = 6


def row(step: int, **numbers: float) -> dict[str, float]:
    """A step's row, of six digits a number."""
    return {"step": step, **{name: float(f"{n:.{_DIGITS}g}") for name, n in numbers.items()}}


def thinned(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of every n-th step from step 1, and the last; at most :data:`MOST_ROWS` + 1.

    n is a power of two and follows from the last step alone, so a curve that was thinned, saved
    and gone on with is the curve of the run that was never stopped.

    Args:
        rows: with ``step``, ascending from 1.
    """
    if not rows:
        return []
    last, stride = int(rows[-1]["step"]), 1
    while -(-last // stride) > MOST_ROWS:
        stride *= 2
    return [dict(r) for r in rows if (r["step"] - 1) % stride == 0 or r["step"] == last]
