"""What the sequences of one forward have in common at their beginning, so that it is computed once.

A token's keys and values depend on nothing but the prefix and the tokens before it. Of several with
an equal past, the first is computed; the others have its place.
"""

from __future__ import annotations

from collections.abc import Sequence

ROOT = -1
"""Stands for the place before a first token."""


class TokenTrie:
    """The computed tokens of one forward, behind one prefix.

    A place is the number of a token among those that are computed.
    """

    def __init__(self) -> None:
        self._next: dict[tuple[int, int], int] = {}

    def find(self, ids: Sequence[int], last: int = ROOT) -> list[int]:
        """The places of the longest beginning of ``ids`` that was added behind ``last``."""
        places: list[int] = []
        for token in ids:
            place = self._next.get((last, token))
            if place is None:
                break
            places.append(place)
            last = place
        return places

    def add(self, ids: Sequence[int], first: int, last: int = ROOT) -> None:
        """Notes tokens that follow the one at ``last`` and are computed at ``first``, and so on.

        A token that is there already, with the same past, keeps its place.
        """
        for place, token in enumerate(ids, first):
            last = self._next.setdefault((last, token), place)
