"""Packed attention with a shared prefix: causal within a sequence, open to the prefix.

One attention function is registered with transformers' attention interface, so no model file is
forked. A :class:`PackedLayout` travels with the model call as a keyword argument and tells the
function which tokens belong together. Three backends give the same result:

``flex``
    FlexAttention with a ``BlockMask``, compiled; the default on a GPU. No backward on CPU
    (torch 2.13).
``grouped``
    Plain matmuls. The prefix is one large product for all tokens; a sequence's own part is computed
    in groups of sequences of like length, so the work grows with ``T * P + sum(length ** 2)`` and
    neither keys nor values are repeated for grouped queries. Tokens with the same past (samples of
    one prompt) are computed once, through the whole model. The default on a CPU.
``dense``
    One product under a full ``[T, P + T]`` mask: the readable reference for the other two.

A call that reaches this function without a layout is an error, and so is a forward in which some
layer did not come through here: nothing falls back to full attention. Dropout is not applied
(the base model is frozen and in eval mode).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from cartridge_distill.errors import ConfigError

if TYPE_CHECKING:
    from cartridge_distill.packing import PackedBatch
    from cartridge_distill.prefix import Prefix

ATTENTION_NAME = "cartridge_packed"
BACKENDS = ("auto", "flex", "grouped", "dense")

# Scores held at once by one grouped product, in elements: 32 Mi floats are 128 MiB. Bounds the
# memory of a teacher with a long document on a CPU; the result does not depend on it.
_SCORE_BUDGET = 32 * 1024 * 1024
# Sequences share a group while the shortest is at least this part of the longest: bounds the
# padding inside a group to a third of its own-sequence work.
_GROUP_RATIO = 0.75


def resolve_backend(backend: str, device: torch.device) -> str:
    """ "auto" by device; anything else as given.

    Raises:
        ConfigError: an unknown name.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"attention backend {backend!r} is unknown; choose one of {BACKENDS}")
    if backend == "auto":
        return "flex" if device.type == "cuda" else "grouped"
    return backend


@dataclass(frozen=True)
class _Group:
    """Sequences of like shape, padded to the longest of them.

    Attributes:
        queries: ``[n, q]`` computed tokens whose attention is asked for; a shorter sequence's row is
            filled up with its last one, and the results there are never used.
        places: ``[n, q]`` place of each query in its sequence.
        keys: ``[n, k]`` computed tokens of each sequence from its beginning, filled up likewise.
    """

    queries: Tensor
    places: Tensor
    keys: Tensor


class PackedLayout:
    """Which token may see which, for one forward; masks are built once and shared by all layers.

    Sequences of a batch often begin alike: samples of one prompt, prompts about one section. With
    ``share_beginnings`` a token whose whole past equals another's is computed once: its hidden
    states are the same. ``computed`` says which tokens of the row are, ``of_token`` where each
    token's result is found. Only the grouped backend can do this.
    """

    def __init__(
        self,
        batch: PackedBatch,
        prefix: Prefix | None,
        backend: str,
        share_beginnings: bool = False,
    ) -> None:
        self.batch = batch
        self.prefix = prefix
        self.backend = backend
        self.prefix_tokens = prefix.num_tokens if prefix is not None else 0
        self._layers_seen: set[int] = set()
        self._masks: dict[tuple[str, int | None], Any] = {}
        self._groups: list[_Group] | None = None
        self._restore: Tensor | None = None
        device = batch.input_ids.device
        if share_beginnings and backend == "grouped":
            computed, of_token = _shared_beginnings(batch)
            self.computed = torch.tensor(computed, device=device)
            self.of_token = torch.tensor(of_token, device=device)
        else:
            self.computed = self.of_token = torch.arange(batch.num_tokens, device=device)

    def note_layer(self, layer: int) -> None:
        self._layers_seen.add(layer)

    def check_used_by_all(self, num_layers: int) -> None:
        """Raises ConfigError when a layer computed its attention elsewhere."""
        missing = sorted(set(range(num_layers)) - self._layers_seen)
        if missing:
            raise ConfigError(
                f"layers {missing} did not use the packed attention: their sequences saw each "
                "other and not the prefix. This model class is not supported"
            )

    def allowed(self, window: int | None) -> Tensor:
        """``[T, P + T]`` bool: may query i see key j (the prefix first)?"""
        key = ("dense", window)
        if key not in self._masks:
            seq, index = self.batch.seq_ids, self.batch.index
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
        """The same rule as a FlexAttention ``BlockMask``."""
        key = ("flex", window)
        if key not in self._masks:
            from torch.nn.attention.flex_attention import create_block_mask

            seq, index, prefix = self.batch.seq_ids, self.batch.index, self.prefix_tokens
            none = torch.full((prefix,), -1, dtype=seq.dtype, device=seq.device)
            key_seq = torch.cat([none, seq])  # prefix tokens carry seq_id -1: open to all
            key_pos = torch.cat([torch.arange(prefix, device=seq.device), prefix + index])
            query_pos = prefix + index

            def rule(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                visible = (key_seq[k] == -1) | (
                    (key_seq[k] == seq[q]) & (key_pos[k] <= query_pos[q])
                )
                if window is not None:
                    visible = visible & (query_pos[q] - key_pos[k] < window)
                return visible

            tokens = seq.shape[0]
            self._masks[key] = create_block_mask(
                rule, None, None, tokens, prefix + tokens, device=seq.device
            )
        return self._masks[key]

    def groups(self) -> list[_Group]:
        """Every computed token once as a query, with the keys of its sequence."""
        if self._groups is None:
            starts, lengths = self.batch.offsets, self.batch.lengths
            own = [0] * len(lengths)  # how many tokens each sequence computes itself: its last ones
            for token in self.computed.tolist():
                own[int(self.batch.seq_ids[token])] += 1
            order = [b for b in range(len(lengths)) if own[b]]
            order.sort(key=lambda b: (-lengths[b], -own[b]))
            where = self.of_token.tolist()
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
                longest, queries = lengths[head], own[head]

                def rows(b: int, places: Sequence[int]) -> list[int]:
                    return [where[starts[b] + place] for place in places]

                asked = [
                    [min(lengths[b] - own[b] + i, lengths[b] - 1) for i in range(queries)]
                    for b in members
                ]
                read = [[min(i, lengths[b] - 1) for i in range(longest)] for b in members]
                device = self.batch.input_ids.device
                self._groups.append(
                    _Group(
                        torch.tensor(
                            [rows(*p) for p in zip(members, asked, strict=True)], device=device
                        ),
                        torch.tensor(asked, device=device),
                        torch.tensor(
                            [rows(*p) for p in zip(members, read, strict=True)], device=device
                        ),
                    )
                )
        return self._groups

    def restore(self, queries: list[Tensor]) -> Tensor:
        """Where in the concatenated group results each computed token stands first."""
        if self._restore is None:
            token = torch.cat(queries)
            slots = torch.arange(token.shape[0], device=token.device)
            first = torch.full_like(self.computed, token.shape[0])
            self._restore = first.scatter_reduce(0, token, slots, reduce="amin")
        return self._restore


def _shared_beginnings(batch: PackedBatch) -> tuple[list[int], list[int]]:
    """A trie over the sequences.

    Returns:
        The tokens of the row that are the first with their past, and for each token of the row
        the number of its equal among them.
    """
    known: dict[tuple[int, int], int] = {}
    computed: list[int] = []
    of_token: list[int] = []
    ids = batch.input_ids.tolist()
    for start, length in zip(batch.offsets, batch.lengths, strict=False):
        node = -1
        for token in range(start, start + length):
            key = (node, ids[token])
            if key not in known:
                known[key] = len(computed)
                computed.append(token)
            node = known[key]
            of_token.append(node)
    return computed, of_token


def _scores(query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> Tensor:
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores


def _weights(scores: Tensor, dtype: torch.dtype) -> Tensor:
    # float32 softmax whatever the model's dtype, as transformers' eager attention does.
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(dtype)


def _dense(
    layout: PackedLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor] | None,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """query ``[Hq, T, D]``, key and value ``[H, T, D]`` -> ``[Hq, T, D]``."""
    heads, tokens, size = key.shape
    if past is not None:
        key, value = torch.cat([past[0], key], dim=1), torch.cat([past[1], value], dim=1)
    grouped = query.reshape(heads, -1, tokens, size)
    scores = _scores(grouped, key[:, None], scaling, softcap)
    scores = scores.masked_fill(~layout.allowed(window), float("-inf"))
    return torch.matmul(_weights(scores, value.dtype), value[:, None]).reshape(query.shape)


def _group_attention(
    layout: PackedLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    past: tuple[Tensor, Tensor] | None,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """n sequences: query ``[H, n, G, q, D]`` at ``places`` ``[n, q]``; key, value ``[H, n, k, D]``."""
    heads, members, per_head, length, _ = query.shape
    keys = key.shape[2]
    own = _scores(query.flatten(2, 3), key, scaling, softcap)  # [H, n, G * q, k]
    distance = places[:, None, :, None] - torch.arange(keys, device=query.device)
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    own = own.view(heads, members, per_head, length, keys).masked_fill(~allowed, float("-inf"))
    if past is None:
        weights = _weights(own, value.dtype).flatten(2, 3)
        return torch.matmul(weights, value).view(query.shape)
    shared = _scores(query.flatten(1, 3), past[0], scaling, softcap)  # one product for all
    shared = shared.view(heads, members, per_head, length, -1)
    if window is not None:
        visible = layout.prefix_allowed(places, window)[:, None]
        shared = shared.masked_fill(~visible, float("-inf"))
    weights = _weights(torch.cat([shared, own], dim=-1), value.dtype)
    from_past = weights[..., : layout.prefix_tokens].reshape(heads, -1, layout.prefix_tokens)
    from_own = weights[..., layout.prefix_tokens :].flatten(2, 3)
    out = torch.matmul(from_past, past[1]).view(query.shape)
    return out + torch.matmul(from_own, value).view(query.shape)


def _grouped(
    layout: PackedLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor] | None,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """query ``[Hq, U, D]``, key and value ``[H, U, D]`` of the U computed tokens -> ``[Hq, U, D]``."""
    heads, tokens, size = key.shape
    by_head = query.view(heads, -1, tokens, size)
    pieces: list[Tensor] = []
    asked: list[Tensor] = []
    for group in layout.groups():
        members, queries = group.queries.shape
        longest = group.keys.shape[1]
        row_cost = query.shape[0] * (layout.prefix_tokens + longest)
        at_once = max(1, _SCORE_BUDGET // row_cost)  # queries
        n_at_once, q_at_once = max(1, at_once // queries), min(queries, at_once)
        for n in range(0, members, n_at_once):
            some = slice(n, n + n_at_once)
            k = key[:, group.keys[some]]  # [H, n, k, D]
            v = value[:, group.keys[some]]
            for first in range(0, queries, q_at_once):
                rows = group.queries[some, first : first + q_at_once]
                q = by_head[:, :, rows].transpose(1, 2)  # [H, n, G, q, D]
                places = group.places[some, first : first + q_at_once]
                out = _group_attention(layout, q, k, v, places, past, scaling, softcap, window)
                pieces.append(out.transpose(1, 2).reshape(query.shape[0], -1, size))
                asked.append(rows.reshape(-1))
    return torch.cat(pieces, dim=1)[:, layout.restore(asked)]


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return cast(Callable[..., Any], torch.compile(flex_attention, dynamic=True))


def _flex(
    layout: PackedLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor] | None,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if past is not None:
        key, value = torch.cat([past[0], key], dim=1), torch.cat([past[1], value], dim=1)
    score_mod = None
    if softcap is not None:

        def score_mod(score: Tensor, *_: Tensor) -> Tensor:
            return softcap * torch.tanh(score / softcap)

    # Uncompiled FlexAttention is only for comparing results on a CPU.
    attend = _compiled_flex() if query.is_cuda else flex_attention
    out = attend(
        query[None],
        key[None],
        value[None],
        score_mod=score_mod,
        block_mask=layout.block_mask(window),
        scale=scaling,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return cast(Tensor, out)[0]


_IMPLEMENTATIONS = {"flex": _flex, "grouped": _grouped, "dense": _dense}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed_layout: PackedLayout | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every attention layer.

    Args:
        query: ``[1, Hq, T, D]``; key, value: ``[1, H, T, D]``, after RoPE.
        packed_layout: handed through from :func:`cartridge_distill.forward.packed_forward`.

    Returns:
        ``[1, T, Hq, D]`` and None (no attention weights).

    Raises:
        ConfigError: called without a layout, or with what it cannot compute exactly.
    """
    if packed_layout is None:
        raise ConfigError(
            f"attention {ATTENTION_NAME!r} was called without a packed layout; call the model "
            "through cartridge_distill.forward.packed_forward, or load it with another "
            "attn_implementation"
        )
    if s_aux is not None:
        raise ConfigError("attention sinks (s_aux) are not supported by the packed attention")
    layer = cast(int, module.layer_idx)
    packed_layout.note_layer(layer)
    past = None
    if packed_layout.prefix is not None:
        # The cast is part of the graph: an fp32 master cartridge gets its gradient through it.
        past = (
            packed_layout.prefix.keys[layer][0].to(query.dtype),
            packed_layout.prefix.values[layer][0].to(query.dtype),
        )
    attend = _IMPLEMENTATIONS[packed_layout.backend]
    out = attend(
        packed_layout,
        query[0],
        key[0],
        value[0],
        past,
        scaling if scaling is not None else query.shape[-1] ** -0.5,
        softcap,
        sliding_window,
    )
    return out.transpose(0, 1)[None], None


def register() -> None:
    """Makes the function known to transformers under :data:`ATTENTION_NAME`; safe to repeat."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
