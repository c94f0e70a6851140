"""How much of a text fits a budget of tokens, found with few and short measurements.

The size of a text is taken to grow with it. So a place beyond what fits is looked for first, a
little more at a time, and then the last place that fits between what is known: each guess
assumes that tokens are as dense in between as they were measured to be. A text of any length is
never tokenised whole for the beginning of it that fits.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

_FIRST_RATE = 4.0  # characters a token, until something was measured
_MORE = 1.2
_GUESSES = 3  # in a row; then the middle is taken, so that odd texts end soon as well


class Fitting:
    """Finds how far a text may go, from one place of it after the other.

    Args:
        size: (start, end) of a piece of the text -> its tokens.
        budget: tokens at most.
    """

    def __init__(self, size: Callable[[int, int], int], budget: int) -> None:
        self._size = size
        self._budget = budget
        self._rate = _FIRST_RATE  # of the last piece: texts change slowly

    def furthest(self, start: int, ends: Sequence[int], first: int = 0) -> int | None:
        """Index of the last of `ends[first:]` up to which the text from `start` fits.

        Args:
            start: where the piece begins.
            ends: where it may end, ascending; those from `first` on lie behind `start`.

        Returns:
            None when not even the first fits.
        """
        if first >= len(ends):
            return None
        low, low_size = start, 0
        high, high_size = self._beyond(start, ends[-1])
        if high is None:
            return len(ends) - 1
        good, bad = first - 1, bisect_left(ends, high, lo=first)
        guesses = 0
        while bad - good > 1:
            guesses += 1
            middle = (good + bad) // 2
            if guesses % (_GUESSES + 1):
                dense = (high - low) / max(1, high_size - low_size)
                guess = low + (self._budget - low_size) * dense
                middle = min(max(bisect_right(ends, guess, lo=first) - 1, good + 1), bad - 1)
            size = self._size(start, ends[middle])
            if size <= self._budget:
                good, low, low_size = middle, ends[middle], size
            else:
                bad, high, high_size = middle, ends[middle], size
        if good >= first and low_size:
            self._rate = (low - start) / low_size
        return good if good >= first else None

    def _beyond(self, start: int, end: int) -> tuple[int | None, int]:
        """(a place that nothing which fits reaches, its size); None where all of it fits."""
        reach = int(self._rate * self._budget * _MORE) + 1
        while start + reach < end:
            size = self._size(start, start + reach)
            if size > self._budget:
                return start + reach, size
            reach *= 2
        size = self._size(start, end)
        return (end, size) if size > self._budget else (None, size)
