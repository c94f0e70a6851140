"""Long beginnings that prompts share, computed once and kept: a document before many questions.

A beginning's KV is a :class:`Prefix`, as a cartridge's is, so the rows that share it read one copy
of it in one product (``attention``); what is left of each prompt is computed as its own. Results
are those of no sharing, to rounding.

A beginning is worth keeping when two prompts have it: two of those at hand, or one of them and one
that came lately; or when the server was told to expect it. What they all have in common is kept,
and nothing of what only some of them say, unless that is long as well. Matching is by token ids, in
whole beginnings. Bounded by tokens, the least recently used goes first; rows in flight keep what
they hold until they are done.

Only prompts without a cartridge come here: a cartridge is already a shared beginning.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cartridge_distill.cartridge.prefix import Prefix

Ids = npt.NDArray[np.int64]

# Prompts remembered by their ids, so that a beginning that comes one request at a time is found.
_RECENT = 64


@dataclass(frozen=True)
class Beginning:
    """The first tokens of some prompts, with their KV at positions 0, 1, ..."""

    ids: Ids
    prefix: Prefix


class Beginnings:
    """Finds, computes and keeps beginnings.

    Args:
        compute: (ids, the KV of all that stands before them or None) -> the KV of ids alone.
        max_tokens: bound on the tokens kept, all beginnings together; 0 shares nothing.
        min_tokens: shorter beginnings are not worth a product of their own.
    """

    def __init__(
        self,
        compute: Callable[[list[int], Prefix | None], Prefix],
        max_tokens: int,
        min_tokens: int,
    ) -> None:
        self._compute = compute
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens
        self._kept: OrderedDict[bytes, Beginning] = OrderedDict()
        self._recent: deque[Ids] = deque(maxlen=_RECENT)
        self._expected: list[Ids] = []

    @property
    def tokens(self) -> int:
        """Tokens kept."""
        return sum(len(kept.ids) for kept in self._kept.values())

    def expect(self, ids: Sequence[int]) -> None:
        """A beginning that prompts will have: kept from the first of them on, within the bound."""
        self._expected.append(np.asarray(ids, dtype=np.int64))

    def find(self, prompts: Sequence[Sequence[int]]) -> list[Beginning | None]:
        """The longest beginning for each prompt; what they newly share is computed here.

        At least the last token of a prompt is left out, for its logits are wanted.
        """
        if self._max_tokens < self._min_tokens:
            return [None] * len(prompts)
        ids = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
        found = [self._longest(prompt) for prompt in ids]
        while groups := self._groups(ids, found):
            for members, common in groups:
                beginning = self._add(common)
                for member in members:
                    found[member] = beginning
        self._recent.extend(prompt for prompt in ids if len(prompt) > self._min_tokens)
        return found

    def _longest(self, prompt: Ids) -> Beginning | None:
        fitting = [
            (len(kept.ids), key)
            for key, kept in self._kept.items()
            if len(kept.ids) < len(prompt) and _common(kept.ids, prompt) == len(kept.ids)
        ]
        if not fitting:
            return None
        _, key = max(fitting)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _groups(
        self, prompts: list[Ids], found: list[Beginning | None]
    ) -> list[tuple[list[int], Ids]]:
        """Prompts that share ``min_tokens`` more than is known, with all that they share."""
        alike: dict[bytes, list[int]] = {}
        for number, (prompt, beginning) in enumerate(zip(prompts, found, strict=True)):
            wanted = self._min_tokens + (len(beginning.ids) if beginning is not None else 0)
            if wanted < len(prompt) and wanted <= self._max_tokens:
                alike.setdefault(prompt[:wanted].tobytes(), []).append(number)
        groups = []
        for start, members in alike.items():
            company = [prompts[member] for member in members]
            known = (*self._recent, *self._expected)
            company += [other for other in known if other.tobytes().startswith(start)]
            if len(company) < 2:
                continue
            length = min(min(len(prompts[member]) - 1 for member in members), self._max_tokens)
            length = min(length, *(_common(company[0], other) for other in company[1:]))
            groups.append((members, company[0][:length]))
        return groups

    def _add(self, ids: Ids) -> Beginning:
        """Computes what no kept beginning has of ``ids``, and keeps all of it."""
        near, shared = None, 0
        for kept in self._kept.values():
            if (common := _common(kept.ids, ids)) > shared:
                near, shared = kept.prefix, common
        parts = [_cut(near, shared)] if near is not None else []
        if shared < len(ids):
            parts.append(self._compute(ids[shared:].tolist(), parts[0] if parts else None))
        beginning = Beginning(ids, _joined(parts))
        while self._kept and self.tokens + len(ids) > self._max_tokens:
            self._kept.popitem(last=False)
        self._kept[ids.tobytes()] = beginning
        return beginning


def _common(one: Ids, other: Ids) -> int:
    """How many tokens two prompts have in common at their beginning."""
    length = min(len(one), len(other))
    different = one[:length] != other[:length]
    return int(different.argmax()) if different.any() else length


def _cut(prefix: Prefix, tokens: int) -> Prefix:
    return Prefix(
        [key[:, :, :tokens] for key in prefix.keys],
        [value[:, :, :tokens] for value in prefix.values],
    )


def _joined(parts: list[Prefix]) -> Prefix:
    """One after the other; always a copy, so that nothing longer is kept alive by a view."""
    return Prefix(
        [torch.cat(layers, dim=2) for layers in zip(*(part.keys for part in parts), strict=True)],
        [torch.cat(layers, dim=2) for layers in zip(*(part.values for part in parts), strict=True)],
    )
