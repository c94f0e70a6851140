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
    neither keys nor values are repeated for grouped queries. The default on a CPU.
``dense``
    One product under a full ``[T, P + T]`` mask: the readable reference for the other two.

A call that reaches this function without a layout is an error, and so is a forward in which some
layer did not come through here: nothing falls back to full attention. Dropout is not applied
(the base model is frozen and in eval mode).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
    """"auto" by device; anything else as given.

    Raises:
        ConfigError: an unknown name.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"attention backend {backend!r} is unknown; choose one of {BACKENDS}")
    if backend == "auto":
        return "flex" if device.type == "cuda" else "grouped"
    return backend


class PackedLayout:
    """Which token may see which, for one forward; masks are built once and shared by all layers."""

    def __init__(self, batch: PackedBatch, prefix: Prefix | None, backend: str) -> None:
        self.batch = batch
        self.prefix = prefix
        self.backend = backend
        self.prefix_tokens = prefix.num_tokens if prefix is not None else 0
        self._layers_seen: set[int] = set()
        self._masks: dict[tuple[str, int | None], Any] = {}
        self._groups: list[tuple[Tensor, int, int]] | None = None
        self._restore: Tensor | None = None

    def note_layer(self, layer: int) -> None:
        self._layers_seen.add(layer)

    def check_used_by_all(self, num_layers: int) -> None:
        """Raises ConfigError when a layer computed its attention elsewhere."""
        missing = sorted(set(range(num_layers)) - self._layers_seen)
        if missing:
            raise ConfigError(
                f"layers {missing} did not use the packed attention: their sequences saw each other "
                "and not the prefix. This model class is not supported"
            )

    def allowed(self, window: int | None) -> Tensor:
        """``[T, P + T]`` bool: may query i see key j (the prefix first)?"""
        key = ("dense", window)
        if key not in self._masks:
            seq, index, prefix = self.batch.seq_ids, self.batch.index, self.prefix_tokens
            own = (seq[:, None] == seq[None, :]) & (index[:, None] >= index[None, :])
            if window is not None:
                own &= (index[:, None] - index[None, :]) < window
            self._masks[key] = torch.cat([self.prefix_allowed(index, window), own], dim=1)
            assert self._masks[key].shape[1] == prefix + seq.shape[0]
        return cast(Tensor, self._masks[key])

    def prefix_allowed(self, index: Tensor, window: int | None) -> Tensor:
        """``[n, P]`` bool for queries at these places in their sequences."""
        prefix = self.prefix_tokens
        if window is None:
            return torch.ones(index.shape[0], prefix, dtype=torch.bool, device=index.device)
        distance = prefix + index[:, None] - torch.arange(prefix, device=index.device)[None, :]
        return distance < window

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

    def groups(self) -> list[tuple[Tensor, int, int]]:
        """Sequences of like length together.

        Returns:
            (rows ``[n * longest]`` into the packed row, n, longest); a shorter sequence's tail
            repeats its last token, and its results there are never used.
        """
        if self._groups is None:
            starts, lengths = self.batch.offsets, self.batch.lengths
            order = sorted(range(len(lengths)), key=lambda b: -lengths[b])
            self._groups = []
            at = 0
            while at < len(order):
                longest = lengths[order[at]]
                end = at
                while end < len(order) and lengths[order[end]] >= _GROUP_RATIO * longest:
                    end += 1
                members = order[at:end]
                rows = [
                    starts[b] + min(place, lengths[b] - 1)
                    for b in members
                    for place in range(longest)
                ]
                device = self.batch.input_ids.device
                self._groups.append((torch.tensor(rows, device=device), len(members), longest))
                at = end
        return self._groups

    def restore(self, places: list[Tensor]) -> Tensor:
        """``[T]``: where in the concatenated group results each packed token stands.

        A token repeated in a group's padded tail stands there more than once; its true place comes
        first.
        """
        if self._restore is None:
            place = torch.cat(places)
            slots = torch.arange(place.shape[0], device=place.device)
            first = torch.full((self.batch.num_tokens,), place.shape[0], device=place.device)
            self._restore = first.scatter_reduce(0, place, slots, reduce="amin")
        return self._restore


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
    past: tuple[Tensor, Tensor] | None,
    scaling: float,
    softcap: float | None,
    window: int | None,
    first: int,
) -> Tensor:
    """One group of n sequences.

    query ``[H, n, G, q, D]`` holds places ``first .. first + q`` of each sequence; key and value
    ``[H, n, k, D]`` hold places 0..k. Returns ``[H, n, G, q, D]``.
    """
    heads, members, per_head, length, size = query.shape
    keys = key.shape[2]
    index = first + torch.arange(length, device=query.device)
    own = _scores(query.flatten(2, 3), key, scaling, softcap)  # [H, n, G * q, k]
    distance = index[:, None] - torch.arange(keys, device=query.device)[None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    own = own.view(heads, members, per_head, length, keys).masked_fill(~allowed, float("-inf"))
    if past is None:
        weights = _weights(own, value.dtype).flatten(2, 3)
        return torch.matmul(weights, value).view(query.shape)
    shared = _scores(query.flatten(1, 3), past[0], scaling, softcap)  # one product for all n * G * q
    shared = shared.view(heads, members, per_head, length, -1)
    if window is not None:
        shared = shared.masked_fill(~layout.prefix_allowed(index, window), float("-inf"))
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
    """query ``[Hq, T, D]``, key and value ``[H, T, D]`` -> ``[Hq, T, D]``."""
    heads, tokens, size = key.shape
    per_head = query.shape[0] // heads
    by_head = query.view(heads, per_head, tokens, size)
    pieces: list[Tensor] = []
    places: list[Tensor] = []
    for rows, members, longest in layout.groups():
        cost = query.shape[0] * longest * (layout.prefix_tokens + longest)
        per_chunk = max(1, min(members, _SCORE_BUDGET // cost))
        query_rows = longest
        if per_chunk == 1:
            query_rows = max(1, min(longest, _SCORE_BUDGET * longest // cost))
        for at in range(0, members, per_chunk):
            n = min(per_chunk, members - at)
            chunk = rows[at * longest : (at + n) * longest]
            whole = len(chunk) == tokens and len(layout.batch.lengths) == members == n
            in_order = whole and members == 1  # the row as it is: no gather needed
            k = key if in_order else key[:, chunk]
            v = value if in_order else value[:, chunk]
            q = by_head if in_order else by_head[:, :, chunk]
            k, v = (x.view(heads, n, longest, size) for x in (k, v))
            q = q.view(heads, per_head, n, longest, size).transpose(1, 2)
            for first in range(0, longest, query_rows):
                end = min(first + query_rows, longest)
                out = _group_attention(
                    layout,
                    q[:, :, :, first:end],
                    k[:, :, :end],
                    v[:, :, :end],
                    past,
                    scaling,
                    softcap,
                    window,
                    first,
                )
                # [H, n, G, q, D] -> [Hq, n * q, D]
                pieces.append(out.transpose(1, 2).reshape(query.shape[0], -1, size))
                places.append(chunk.view(n, longest)[:, first:end].reshape(-1))
    return torch.cat(pieces, dim=1)[:, layout.restore(places)]


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
