"""Batches that are asked for before they are trained: which ones, and where the data stood.

With ``async_steps=S`` the rollouts of the next S batches are written while a batch is trained. A
checkpoint is of the last batch that was *trained*; those asked for ahead die with the run, and the
next start asks for them again. So the position in the data is noted behind each batch when it is
taken, and a save writes that of its own step.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


class Ahead:
    """The batches between the one that is trained and the last one that was asked for.

    Args:
        async_steps: S, how many are asked for ahead; 0 asks for each when it is due.
        trained: steps done when this start of the run began.
        last: the run's last step; none is asked for beyond it.
    """

    def __init__(self, async_steps: int, trained: int, last: int) -> None:
        self._async_steps, self._last = async_steps, last
        self._asked = trained
        self._positions: dict[int, Any] = {}

    def due(self, step: int) -> range:
        """The steps whose batches are to be asked for at the beginning of a step, in order."""
        return range(self._asked + 1, min(step + self._async_steps, self._last) + 1)

    def asked(self, step: int, position: Any) -> None:
        """A step's batch was asked for.

        Args:
            position: of the data, behind the batch.

        Raises:
            ValueError: the steps before it were not, or it was.
        """
        if step != self._asked + 1:
            raise ValueError(f"the batch of step {step} after that of step {self._asked}")
        self._asked = step
        self._positions[step] = copy.deepcopy(position)

    def position(self, step: int) -> Any:
        """Where the data stood behind the batch of a step that was trained; forgets those before.

        Raises:
            KeyError: it was not asked for in this start of the run, or is forgotten.
        """
        for past in [number for number in self._positions if number < step]:
            del self._positions[past]
        return self._positions[step]


def staleness_metrics(ages: Mapping[int, int], async_steps: int) -> dict[str, float]:
    """The batch's mean age, and how many samples have which.

    Args:
        ages: number of the student's samples by age in optimizer steps.
    """
    count = sum(ages.values())
    mean = sum(age * number for age, number in ages.items()) / count if count else 0.0
    by_age = {
        f"training/staleness_samples/{age}": ages.get(age, 0) for age in range(async_steps + 1)
    }
    return {"training/staleness_mean": mean, **by_age}
