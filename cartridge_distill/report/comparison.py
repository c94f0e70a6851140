"""Recipes against each other at equal tokens: one value a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from cartridge_distill.evaluation.names import TRAINED
from cartridge_distill.report.groups import Group, TokenAxis, value_at
from cartridge_distill.report.reading import Interval, Run

# Lower is better for each; the first that was measured decides. Without questions there are
# held-out prompts.
DECIDING = {
    "log_loss": "log-loss of the right answer",
    "kl": "KL to the full document",
    "prompt_kl": "KL to the full document on held-out prompts",
}


@dataclass(frozen=True)
class Standing:
    """A group after equal tokens: one value for each seed."""

    group: Group
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return mean(self.values)


@dataclass(frozen=True)
class Comparison:
    """Groups, least first, after ``tokens``; None where only the ends of the runs are compared."""

    metric: str
    title: str
    tokens: float | None
    standings: tuple[Standing, ...]


def compare(groups: Sequence[Group], axis: TokenAxis | None) -> Comparison | None:
    """The groups at equal tokens; without validation curves, after each run's last step.

    Returns:
        None where neither is there for all runs.
    """
    for metric in ("kl", "log_loss"):
        comparison = at_equal_tokens(groups, axis, metric)
        if comparison is not None:
            return comparison
    for metric, title in DECIDING.items():
        standings = [
            Standing(
                group, tuple(found.mean for run in group.runs if (found := _final(run, metric)))
            )
            for group in groups
        ]
        if all(len(each.values) == len(each.group.runs) for each in standings):
            return Comparison(metric, title, None, _best_first(standings))
    return None


def at_equal_tokens(
    groups: Sequence[Group], axis: TokenAxis | None, metric: str
) -> Comparison | None:
    """The validation curves at the largest number of tokens that all of them reached.

    Returns:
        None where a run has no such curve, or one that begins later.
    """
    runs = [run for group in groups for run in group.runs]
    ends = [run.metrics.series(f"val/{metric}")[-1:] for run in runs]
    if axis is None or not all(ends):
        return None
    tokens = min(axis.at(run, end[0][0]) for run, end in zip(runs, ends, strict=True))
    standings = [
        Standing(
            group,
            tuple(
                value_at(run.metrics.series(f"val/{metric}"), run, axis, tokens)
                for run in group.runs
            ),
        )
        for group in groups
    ]
    if any(math.isnan(value) for each in standings for value in each.values):
        return None
    return Comparison(metric, DECIDING.get(metric, metric), tokens, _best_first(standings))


def _final(run: Run, metric: str) -> Interval | None:
    row = run.evaluation.get(TRAINED) if run.evaluation is not None else None
    return row.get(metric) if row is not None else None


def _best_first(standings: Sequence[Standing]) -> tuple[Standing, ...]:
    return tuple(sorted(standings, key=lambda each: each.mean))
