"""Intervals by the percentile bootstrap over questions (Efron and Tibshirani 1993, chapter 13).

Every score here is a ratio of sums over questions: KL is nats over tokens, a mean is a sum over a
count. A resample draws as many questions, with replacement, and takes the ratio anew; of 10,000
of them the middle 95 % is the interval. Scores of one set of questions use the same draws, so that
the interval of a difference is that of paired questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 10_000
_BATCH = 1_000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A score and its interval, over n questions."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Ratio:
    """A score as ``sum(values) / sum(weights)`` over n questions.

    A question of weight 0 has nothing to say about the score, as a short answer about late tokens,
    and is not drawn.
    """

    values: Sequence[float]
    weights: Sequence[float]

    @classmethod
    def mean_of(cls, values: Sequence[float]) -> Ratio:
        return cls(values, [1.0] * len(values))

    @property
    def counting(self) -> NDArray[np.bool_]:
        """``[n]`` bool: which questions have any weight."""
        return np.asarray(self.weights, float) > 0

    def take(self, questions: NDArray[np.bool_]) -> Ratio:
        """The score over some of the questions."""
        return Ratio(
            np.asarray(self.values, float)[questions].tolist(),
            np.asarray(self.weights, float)[questions].tolist(),
        )

    @property
    def value(self) -> float:
        return float(np.sum(self.values) / np.sum(self.weights))


def estimate(ratio: Ratio, seed: int = 0) -> Estimate:
    """A score with its interval.

    Raises:
        ValueError: there is no question, or none that counts.
    """
    ratio = ratio.take(ratio.counting)
    resampled = _resampled(ratio, seed)
    return _interval(ratio.value, resampled, len(ratio.values))


def estimate_difference(ratio: Ratio, baseline: Ratio, seed: int = 0) -> Estimate:
    """``ratio - baseline`` of the same questions, in the same order, where both count.

    Raises:
        ValueError: they are not as many, or none.
    """
    if len(ratio.values) != len(baseline.values):
        raise ValueError(
            f"{len(ratio.values)} and {len(baseline.values)} questions cannot be compared in pairs"
        )
    both = ratio.counting & baseline.counting
    ratio, baseline = ratio.take(both), baseline.take(both)
    differences = _resampled(ratio, seed) - _resampled(baseline, seed)
    return _interval(ratio.value - baseline.value, differences, len(ratio.values))


def _resampled(ratio: Ratio, seed: int) -> Floats:
    """The score of each resample ``[RESAMPLES]``."""
    count = len(ratio.values)
    if count == 0:
        raise ValueError("there is nothing to resample")
    values, weights = np.asarray(ratio.values, float), np.asarray(ratio.weights, float)
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(0, RESAMPLES, _BATCH):  # so that thousands of questions fit in memory
        drawn = generator.integers(count, size=(_BATCH, count))
        found.append(values[drawn].sum(axis=1) / weights[drawn].sum(axis=1))
    return np.concatenate(found)


def _interval(value: float, resampled: Floats, count: int) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(value, float(low), float(high), count)
