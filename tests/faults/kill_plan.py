"""When ``kill_harness.py`` kills: moments drawn from a seed, and what they mean in a run."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.faults.kill_phases import BEFORE, PHASES, Mark

TARGETS = ("trainer", "worker", "proxy", "agent-loop", "storage", "server")
# Which processes a target is; each moment draws one.
VICTIMS = {"trainer": ("driver", "task-runner"), "server": ("server", "server", "gateway")}
# Each of these once, in an order that is drawn anew, then each once again. Starting is not the
# server's: it was there before the run.
_AIMS = (BEFORE, "rollout", "update", "save", "sync", "record")


@dataclass(frozen=True)
class Moment:
    """When to kill: at a phase of the ``ahead``-th step from where the run stands, after a part
    ``delay`` of what that phase usually takes."""

    number: int
    victim: str
    phase: str
    ahead: int
    delay: float


def plan(target: str, moments: int, seed: int) -> list[Moment]:
    """The moments of a target; the same for the same seed, the first of more are those of fewer."""
    draw = random.Random(f"{seed}/{target}")
    found: list[Moment] = []
    while len(found) < moments:
        aims = list(_AIMS[1:] if target == "server" else _AIMS)
        draw.shuffle(aims)
        for phase in aims:
            victim = draw.choice(VICTIMS.get(target, (target,)))
            ahead = draw.choice((1, 2))
            if phase == "rollout":
                ahead = 2  # in the first of an attempt the agent loop is still starting
            found.append(Moment(len(found), victim, phase, ahead, draw.random()))
    return found[:moments]


@dataclass(frozen=True)
class Usual:
    """What the run that was never stopped took: seconds from a process's start to the first
    update, and seconds a phase."""

    starts: dict[str, float]
    phases: dict[str, float]

    @classmethod
    def of(cls, born: Mapping[str, float], marks: Sequence[Mark]) -> Usual:
        """From the moments at which its processes began, and its marks."""
        update = next(mark.when for mark in marks if mark.phase == "update")
        starts = {name: update - when for name, when in born.items()}
        found: dict[str, list[float]] = {phase: [] for phase in PHASES}
        for mark, following in zip(marks, marks[1:], strict=False):
            found[mark.phase].append(following.when - mark.when)
        return cls(starts, {phase: statistics.median(seconds) for phase, seconds in found.items()})

    def delay(self, moment: Moment) -> float:
        """Seconds from the beginning of the process, or of the phase, to the kill."""
        whole = self.starts[moment.victim] if moment.phase == BEFORE else self.phases[moment.phase]
        return moment.delay * whole

    def due(self, moment: Moment, step: int, born: float, marks: Sequence[Mark]) -> float | None:
        """When to kill; None while the phase that is aimed at has not begun.

        Args:
            step: that is aimed at.
            born: when the victim began.
            marks: of the run so far. A start that is quicker than usual is over with its first
                update, so that is the latest moment of one.
        """
        if moment.phase == BEFORE:
            over = [mark.when for mark in marks if mark.phase == "update"]
            return min([born + self.delay(moment), *over])
        aimed = (step, PHASES.index(moment.phase))
        began = [m.when for m in marks if (m.step, PHASES.index(m.phase)) >= aimed]
        return began[0] + self.delay(moment) if began else None
