"""Which token may see which: the layout of one packed forward.

A :class:`PackedLayout` travels with the model call as a keyword argument to the attention function
of every layer (:mod:`cartridge_distill.model.attention`). Masks and groups are built once and
shared by all layers. Nothing here computes attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.model.kept_tokens import KeptOfRow
from cartridge_distill.model.packing import HostIndex, PackedBatch, on_device
from cartridge_distill.model.scoring import Scoring
from cartridge_distill.model.token_trie import ROOT, TokenTrie
from cartridge_distill.util.errors import ConfigError

Observer = Callable[[int, Tensor, Tensor, Tensor, Scoring], None]
"""Called in every layer with the layer of the prefix that it sees, its queries ``[Hq, T, D]``, its
keys ``[H, T, D]``, the prefix's ``[H, P, D]``, and how it makes scores of them."""

# Sequences share a group while the shortest is at least this part of the longest: bounds the
# padding inside a group to a third of its own-sequence work.
_GROUP_RATIO = 0.75


@dataclass(frozen=True)
class Group:
    """Sequences of like shape, padded to the longest of them.

    Attributes:
        queries: ``[n, q]`` computed tokens whose attention is asked for; a shorter sequence's row
            is filled up with its last one, and the results there are never used.
        places: ``[n, q]`` place of each query in its sequence.
        keys: ``[n, k]`` tokens of each sequence from its beginning, filled up likewise: kept ones
            first, then computed ones.
    """

    queries: Tensor
    places: Tensor
    keys: Tensor


class PackedLayout:
    """Which token may see which, for one forward; masks are built once and shared by all layers.

    Sequences of a batch often begin alike: samples of one prompt, prompts about one section. With
    ``share_beginnings`` a token whose whole past equals another's is computed once: its hidden
    states are the same. ``computed`` says which tokens of the row are, ``of_token`` where each
    token's result is found. Only the grouped backend can do this, and only it knows ``kept``
    tokens, whose keys and values are there from an earlier forward.

    Attributes:
        kv_sources: for each decoder layer the layer of the prefix that it sees; by default its own.
        computed: ``[U]`` places in the row, on the host.
        of_token: ``[T]`` for each token its place among the computed ones, on the host; below 0 for
            a kept one, which has no result.
        kept: what is known of the row; None knows nothing and keeps nothing.
        observer: is told of every layer's queries and keys; None where nobody looks.
    """

    observer: Observer | None = None

    def __init__(
        self,
        batch: PackedBatch,
        prefix: Prefix | None,
        backend: str,
        share_beginnings: bool = False,
        kv_sources: Sequence[int] | None = None,
        kept: KeptOfRow | None = None,
    ) -> None:
        self.batch = batch
        self.kept = kept
        self.prefix = prefix
        self.backend = backend
        self.prefix_tokens = prefix.num_tokens if prefix is not None else 0
        layers = range(len(prefix.keys)) if prefix is not None else ()
        self.kv_sources = tuple(layers if kv_sources is None else kv_sources)
        self._layers_seen: set[int] = set()
        self._masks: dict[tuple[str, int | None], Any] = {}
        self._groups: list[Group] | None = None
        self._restore: Tensor | None = None
        if kept is not None:
            self.computed, numbers = _shared_beginnings(batch, kept.known, kept.count)
            kept.plan(numbers, batch.offsets)
            self.of_token = numbers - kept.count
        elif share_beginnings and backend == "grouped":
            self.computed, self.of_token = _shared_beginnings(batch)
        else:
            self.computed = self.of_token = np.arange(batch.num_tokens)

    def note_layer(self, layer: int) -> None:
        """The layer came through the packed attention."""
        self._layers_seen.add(layer)

    def check_used_by_all(self, num_layers: int) -> None:
        """Raises ConfigError when a layer computed its attention elsewhere."""
        missing = sorted(set(range(num_layers)) - self._layers_seen)
        if missing:
            raise ConfigError(
                f"layers {missing} did not use the packed attention: their sequences saw each "
                "other and not the prefix. This model class is not supported; fix: use another"
            )

    def allowed(self, window: int | None) -> Tensor:
        """``[T, P + T]`` bool: may query i see key j (the prefix first)?"""
        key = ("dense", window)
        if key not in self._masks:
            seq, index = (
                on_device(values, self.batch.device, torch.long)
                for values in (self.batch.seq_ids, self.batch.index)
            )
            own = (seq[:, None] == seq[None, :]) & (index[:, None] >= index[None, :])
            if window is not None:
                own &= (index[:, None] - index[None, :]) < window
            self._masks[key] = torch.cat([self.prefix_allowed(index, window), own], dim=1)
        return cast(Tensor, self._masks[key])

    def prefix_allowed(self, place: Tensor, window: int | None) -> Tensor:
        """``[..., P]`` bool for queries at these ``[...]`` places in their sequences."""
        prefix = torch.arange(self.prefix_tokens, device=place.device)
        if window is None:
            return torch.ones_like(place[..., None], dtype=torch.bool).expand(
                *place.shape, self.prefix_tokens
            )
        return self.prefix_tokens + place[..., None] - prefix < window

    def block_mask(self, window: int | None) -> Any:
        """The same rule as a FlexAttention ``BlockMask``, see :mod:`.blocks`."""
        key = ("flex", window)
        if key not in self._masks:
            from cartridge_distill.model.blocks import make_block_mask

            self._masks[key] = make_block_mask(self.batch, self.prefix_tokens, window)
        return self._masks[key]

    def groups(self) -> list[Group]:
        """Every computed token once as a query, with the keys of its sequence."""
        if self._groups is None:
            starts, lengths = self.batch.offsets, np.array(self.batch.lengths)
            # How many tokens each sequence computes itself: its last ones.
            own = np.bincount(self.batch.seq_ids[self.computed], minlength=len(lengths))
            order = [b for b in range(len(lengths)) if own[b]]
            order.sort(key=lambda b: (-lengths[b], -own[b]))
            self._groups = []
            while order:
                head = order[0]
                members = [
                    b
                    for b in order
                    if lengths[b] >= _GROUP_RATIO * lengths[head]
                    and own[head] >= own[b] >= _GROUP_RATIO * own[head]
                ]
                order = [b for b in order if b not in set(members)]
                first, last = starts[members][:, None], lengths[members][:, None] - 1
                skipped = (lengths - own)[members][:, None]
                asked = np.minimum(skipped + np.arange(own[head]), last)
                read = np.minimum(np.arange(lengths[head]), last)
                before = 0 if self.kept is None else self.kept.count
                parts = (self.of_token[first + asked], asked, before + self.of_token[first + read])
                self._groups.append(
                    Group(*(on_device(part, self.batch.device, torch.long) for part in parts))
                )
        return self._groups

    def restore(self, queries: list[Tensor]) -> Tensor:
        """Where in the concatenated group results each computed token stands first."""
        if self._restore is None:
            token = torch.cat(queries)
            slots = torch.arange(token.shape[0], device=token.device)
            first = token.new_full((len(self.computed),), token.shape[0])
            self._restore = first.scatter_reduce(0, token, slots, reduce="amin")
        return self._restore


def _shared_beginnings(
    batch: PackedBatch, known: Sequence[Sequence[int]] | None = None, count: int = 0
) -> tuple[HostIndex, HostIndex]:
    """What the sequences share, see :mod:`.token_trie`.

    Args:
        known: for each sequence the numbers, below ``count``, of its first tokens, which are not
            computed.

    Returns:
        The tokens of the row that are the first with their past, and for each token of the row the
        number of its equal: those that are computed are numbered from ``count`` on.
    """
    trie = TokenTrie()
    computed: list[int] = []
    of_token: list[int] = []
    ids = batch.ids_on_host.tolist()
    start = 0
    for number, length in enumerate(batch.lengths):
        end = start + length
        before = list(known[number]) if known is not None else []
        before += trie.find(ids[start + len(before) : end], before[-1] if before else ROOT)
        start += len(before)
        first = count + len(computed)
        trie.add(ids[start:end], first, before[-1] if before else ROOT)
        of_token += before
        of_token += range(first, first + end - start)
        computed += range(start, end)
        start = end
    return np.array(computed), np.array(of_token)
