"""From off- to on-policy: who writes the samples of a batch, and how many tokens each stage took.

``on_policy_fraction`` is the part of a batch that the student writes, live and with the cartridge.
The teacher, the same model with the document in its context, writes the rest, as in the Cartridges
paper (arXiv 2506.06266), which is fraction 0. The fraction may change over the steps, in straight
lines between given points.

Which sample is whose follows from (seed, step, number in the batch) and nothing else, so a run
repeats, also when it is resumed.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from cartridge_distill.util.errors import ConfigError

STUDENT = "student"
TEACHER = "teacher"

COLD_START = "cold_start"
"""A schedule by its name: the teacher writes the first steps, then the student takes over."""

COLD_STEPS = 16
_COLD = re.compile(rf"{COLD_START}(?::(?P<steps>[0-9]+))?")


_HOW = (
    "no schedule; fix: set a number from 0 (the teacher writes) to 1 (the student writes), a list "
    f"of [step, fraction] pairs, e.g. [[0,0.0],[16,0.0],[32,1.0]], or {COLD_START}:16 (the teacher "
    "writes the first 16 steps, then the student takes over in as many)"
)


@dataclass(frozen=True)
class Schedule:
    """A fraction for every step.

    Attributes:
        points: (step, fraction) with increasing steps; straight lines between them, constant
            before the first and after the last.
    """

    points: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, value: Any) -> Schedule:
        """From a number, a list of (step, fraction) pairs, or ``cold_start`` and ``cold_start:N``.

        ``cold_start:N`` is ``[[N, 0.0], [2 * N, 1.0]]``: the teacher alone writes the first N
        steps, over the next N the student takes over in a straight line; N is 16 where it is not
        said.

        Raises:
            ConfigError: anything else, fractions outside 0 to 1, steps that do not increase.
        """
        if _is_number(value):
            return cls(((0, _fraction(value)),))
        if isinstance(value, str):
            return cls._named(value)
        if not isinstance(value, Sequence) or not value:
            raise ConfigError(_HOW)
        points: list[tuple[int, float]] = []
        for point in value:
            if isinstance(point, str) or not isinstance(point, Sequence) or len(point) != 2:
                raise ConfigError(f"{point!r} is no pair; fix: write [step, fraction]")
            step, fraction = point
            if not isinstance(step, int) or isinstance(step, bool) or step < 0:
                raise ConfigError(f"step {step!r} is no step; fix: set whole numbers, 0 or more")
            if points and step <= points[-1][0]:
                raise ConfigError(
                    f"step {step} after step {points[-1][0]}; fix: let the steps increase"
                )
            points.append((step, _fraction(fraction)))
        return cls(tuple(points))

    @classmethod
    def _named(cls, name: str) -> Schedule:
        found = _COLD.fullmatch(name)
        if found is None:
            raise ConfigError(_HOW)
        steps = COLD_STEPS if found["steps"] is None else int(found["steps"])
        if steps < 1:
            raise ConfigError(
                f"{COLD_START} of {steps} steps is too short; fix: give 1 or more, or leave it out"
            )
        return cls(((steps, 0.0), (2 * steps, 1.0)))

    def at(self, step: int) -> float:
        """The fraction at a step."""
        before = [point for point in self.points if point[0] <= step]
        after = [point for point in self.points if point[0] > step]
        if not before:
            return after[0][1]
        if not after:
            return before[-1][1]
        (start, low), (end, high) = before[-1], after[0]
        return low + (high - low) * (step - start) / (end - start)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher ever writes."""
        return any(fraction < 1 for _, fraction in self.points)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fraction(value: Any) -> float:
    if not _is_number(value) or math.isnan(value) or not 0 <= value <= 1:
        raise ConfigError(f"fraction {value!r} is out of range; fix: set a number from 0 to 1")
    return float(value)


def student_writes(seed: int | None, step: int, samples: int, fraction: float) -> list[bool]:
    """Which samples of a batch the student writes: ``round(fraction * samples)`` of them.

    A larger fraction adds samples to those of a smaller one.

    Args:
        seed: of the run.
        step: the training step.
        samples: in the batch.
        fraction: 0 to 1.
    """

    def rank(number: int) -> bytes:
        return hashlib.sha256(f"{seed}/{step}/{number}".encode()).digest()

    chosen = set(sorted(range(samples), key=rank)[: round(fraction * samples)])
    return [number in chosen for number in range(samples)]


def answer_seed(seed: int | None, row: int, epoch: int, choice: int) -> int:
    """The seed of one answer of the teacher, below 2**31.

    Args:
        seed: of the run.
        row: of the data set.
        epoch: how often the data was gone through before.
        choice: number among the samples of one prompt.
    """
    digest = hashlib.sha256(f"{seed}/{row}/{epoch}/{choice}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def rollout_seed(seed: int | None, row: int, epoch: int, choice: int) -> int:
    """The seed of one rollout of the student, below 2**31: asked again, it draws the same tokens.

    The version that writes it is the server's to count in.

    Args:
        seed, row, epoch, choice: as for :func:`answer_seed`, whose numbers are others.
    """
    digest = hashlib.sha256(f"student/{seed}/{row}/{epoch}/{choice}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True)
class TokenCounts:
    """Response tokens a stage took: what runs are compared at.

    Attributes:
        generated: written by the student.
        generated_by_teacher: written by the teacher; answers from the cache cost nothing.
        teacher_scored: of which the teacher's distribution was computed.
        trained: in the loss.
    """

    generated: int = 0
    generated_by_teacher: int = 0
    teacher_scored: int = 0
    trained: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        pairs = zip(asdict(self).items(), asdict(other).values(), strict=True)
        return TokenCounts(**{name: mine + theirs for (name, mine), theirs in pairs})

    @classmethod
    def from_saved(cls, saved: Mapping[str, int]) -> TokenCounts:
        """What :func:`dataclasses.asdict` made of one."""
        return cls(**{field.name: int(saved[field.name]) for field in fields(cls)})

    def metrics(self, prefix: str) -> dict[str, int]:
        """``{prefix}generated`` and so on."""
        return {f"{prefix}{name}": count for name, count in asdict(self).items()}
