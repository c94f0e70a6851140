"""Attention for serving: rows of ragged length behind cartridges that all rows share.

Registered with transformers' attention interface, so any decoder served through it will do. One
forward takes a packed row of T tokens: whole prompts, pieces of prompts and single decoded tokens
of up to ``max_batch`` rows, mixed. Linear layers see T tokens and no padding. Attention has two
parts, merged by their running maximum and sum:

- the *cartridge*: one product of all its rows' queries with one copy of its keys ``[H, P, D]``,
  never repeated per row;
- the row's *own* keys, in buffers ``[S, H, C, D]``; neighbouring rows of like length go through one
  product (a *segment*), so decoding is a single product over a view of the buffers.

Grouped queries are folded into the query axis; keys and values are never repeated. The softmax runs
in float32 whatever the model's dtype. Training has its own attention
(``cartridge_distill.attention``): that one needs gradients and no buffers, this one the reverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from cartridge_distill.errors import ConfigError
from cartridge_distill.prefix import Prefix

SERVING_ATTENTION = "cartridge_serving"

# Scores held at once, in elements: 32 Mi floats are 128 MiB.
_SCORE_BUDGET = 32 * 1024 * 1024
# Rows share a segment while padding costs less than this, or less than starting another product.
_PADDING_RATIO = 1.35
_SEGMENT_OVERHEAD = 2048
_MASKED = torch.finfo(torch.float32).min


class RowBuffers:
    """Own keys and values of the rows in flight, per layer ``[S, H, C, D]``; row i lies in slot i.

    Slots in use are always 0..n-1, so that any run of neighbours is a view.
    """

    def __init__(
        self, layers: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layers, self._heads, self._head_dim = layers, heads, head_dim
        self._dtype, self._device = dtype, device
        self.slots = 0
        self.capacity = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def reserve(self, slots: int, capacity: int, used: int) -> None:
        """Makes room for ``slots`` rows of ``capacity`` tokens, keeping the first ``used`` slots.

        ``capacity`` must cover the rows in use, too.
        """
        if slots <= self.slots and capacity <= self.capacity:
            return
        # In steps, for a reallocation copies everything; and exactly to need in both directions,
        # for many short rows must not widen the buffers of one long one.
        new_slots, new_capacity = -(-slots // 8) * 8, -(-capacity // 64) * 64
        kept = min(self.capacity, new_capacity)
        shape = (new_slots, self._heads, new_capacity, self._head_dim)

        def grown(old: Tensor | None) -> Tensor:
            # Zeros, not empty: masked places enter products with weight 0, and 0 * NaN is NaN.
            new = torch.zeros(shape, dtype=self._dtype, device=self._device)
            if old is not None and used:
                new[:used, :, :kept] = old[:used, :, :kept]
            return new

        for layer in range(self._layers):
            if self.slots == 0:
                self.keys.append(grown(None))
                self.values.append(grown(None))
            else:
                self.keys[layer] = grown(self.keys[layer])
                self.values[layer] = grown(self.values[layer])
        self.slots, self.capacity = new_slots, new_capacity

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first ``length`` tokens of a row into another slot."""
        for buffer in (*self.keys, *self.values):
            buffer[target, :, :length] = buffer[source, :, :length]

    def release(self) -> None:
        """Gives the memory back; for when nothing is in flight."""
        self.slots = self.capacity = 0
        self.keys, self.values = [], []


@dataclass(frozen=True)
class RowPart:
    """What one row brings into a forward: ``length`` tokens after ``past`` already in its slot.

    ``borrowed``: the first of those ``past`` tokens that another row computes in this very forward,
    as places in the packed row. Each layer writes keys and values before it reads any.
    """

    slot: int
    past: int
    length: int
    prefix: Prefix | None
    borrowed: Sequence[int] = ()


@dataclass
class _Segment:
    """Neighbouring slots ``first .. first + rows`` computed in one padded product."""

    first: int
    rows: int
    queries: int  # longest query length
    keys: int  # longest key length
    places: Tensor | None  # [rows * queries] into the packed row; None: they are start..end
    valid: Tensor | None  # [tokens of the segment] into rows * queries; None: all
    start: int
    end: int
    query_index: Tensor  # [rows, queries], place of each query in its row
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def hidden(self, window: int | None) -> Tensor | None:
        """``[rows, 1, 1, queries, keys]`` bool, true where a key is not seen; None: nowhere."""
        if window not in self.masks:
            key_index = torch.arange(self.keys, device=self.query_index.device)
            distance = self.query_index[:, :, None] - key_index
            hidden = distance < 0
            if window is not None:
                hidden |= distance >= window
            mask = hidden[:, None, None] if bool(hidden.any()) else None
            self.masks[window] = mask
        return self.masks[window]


@dataclass
class _Group:
    """The tokens ``places`` (None: all) of the rows that share one prefix."""

    prefix: Prefix
    places: Tensor | None
    query_index: Tensor  # [t]


class ServingBatch:
    """One forward's layout; travels with the model call and is shared by all layers."""

    def __init__(self, parts: Sequence[RowPart], buffers: RowBuffers, query_heads: int) -> None:
        """``parts`` in slot order."""
        self.buffers = buffers
        device = buffers.keys[0].device
        self.query_heads = query_heads
        slots: list[int] = []
        index: list[int] = []
        for part in parts:
            slots += [part.slot] * part.length
            index += range(part.past, part.past + part.length)
        self.index = torch.tensor(index, device=device)
        sources = list(range(len(index)))
        for part in parts:
            slots += [part.slot] * len(part.borrowed)
            index += range(len(part.borrowed))
            sources += part.borrowed
        # Where each key and value goes, and which packed token it comes from.
        self.write_slots = torch.tensor(slots, device=device)
        self.write_index = torch.tensor(index, device=device)
        everything = len(sources) == len(self.index)
        self.write_sources = None if everything else torch.tensor(sources, device=device)
        self.segments = self._segments(parts, device)
        self.groups = self._groups(parts, device)
        self.layers_seen: set[int] = set()

    def _segments(self, parts: Sequence[RowPart], device: torch.device) -> list[_Segment]:
        segments: list[_Segment] = []
        at, start = 0, 0
        while at < len(parts):
            end = at
            queries = keys = work = 0
            while end < len(parts):
                part = parts[end]
                if end > at and part.slot != parts[end - 1].slot + 1:
                    break
                new_queries = max(queries, part.length)
                new_keys = max(keys, part.past + part.length)
                padded = (end - at + 1) * new_queries * new_keys
                own_work = work + part.length * (part.past + part.length)
                if end > at and (
                    padded > _PADDING_RATIO * own_work + _SEGMENT_OVERHEAD
                    or padded * self.query_heads > _SCORE_BUDGET
                ):
                    break
                queries, keys, work = new_queries, new_keys, own_work
                end += 1
            members = parts[at:end]
            segments.append(self._segment(members, queries, keys, start, device))
            start = segments[-1].end
            at = end
        return segments

    def _segment(
        self,
        members: Sequence[RowPart],
        queries: int,
        keys: int,
        start: int,
        device: torch.device,
    ) -> _Segment:
        places: list[int] = []
        valid: list[int] = []
        query_index: list[list[int]] = []
        token = start
        for row, part in enumerate(members):
            # A short row's tail repeats its last query; the results there are dropped.
            places += [token + min(i, part.length - 1) for i in range(queries)]
            valid += range(row * queries, row * queries + part.length)
            query_index.append([part.past + min(i, part.length - 1) for i in range(queries)])
            token += part.length
        uniform = len(valid) == len(places)
        return _Segment(
            first=members[0].slot,
            rows=len(members),
            queries=queries,
            keys=keys,
            places=None if uniform else torch.tensor(places, device=device),
            valid=None if uniform else torch.tensor(valid, device=device),
            start=start,
            end=token,
            query_index=torch.tensor(query_index, device=device),
        )

    def _groups(self, parts: Sequence[RowPart], device: torch.device) -> list[_Group]:
        places: dict[int, list[int]] = {}
        prefixes: dict[int, Prefix] = {}
        token = 0
        for part in parts:
            if part.prefix is not None:
                prefixes[id(part.prefix)] = part.prefix
                places.setdefault(id(part.prefix), []).extend(range(token, token + part.length))
            token += part.length
        groups = []
        for key, members in places.items():
            everything = len(members) == token
            where = None if everything else torch.tensor(members, device=device)
            index = self.index if where is None else self.index[where]
            groups.append(_Group(prefixes[key], where, index))
        return groups

    def check_used_by_all(self, num_layers: int) -> None:
        """Raises ConfigError when a layer computed its attention elsewhere."""
        missing = sorted(set(range(num_layers)) - self.layers_seen)
        if missing:
            raise ConfigError(
                f"layers {missing} did not use the serving attention; this model class is not "
                "supported by the embedded server"
            )


def _scores(query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> Tensor:
    scores = torch.matmul(query, key.transpose(-1, -2)).float().mul_(scaling)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    return scores


def _exp_in_place(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Turns scores into ``exp(scores - max)``; returns the maximum and the sum, last axis kept."""
    # amax of a fully hidden row is _MASKED: its weights become 1, and vanish in the merge.
    top = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return top, weights.sum(dim=-1, keepdim=True)


def _attend_own(
    batch: ServingBatch,
    layer: int,
    query: Tensor,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """query ``[T, Hq, D]`` against each row's own keys.

    Returns:
        Weighted values ``[T, Hq, D]`` (not normalised), maximum and sum ``[T, Hq, 1]``; float32.
    """
    tokens, query_heads, size = query.shape
    keys, values = batch.buffers.keys[layer], batch.buffers.values[layer]
    heads = keys.shape[1]
    outs: list[Tensor] = []
    tops: list[Tensor] = []
    sums: list[Tensor] = []
    for part in batch.segments:
        taken = query[part.start : part.end] if part.places is None else query[part.places]
        # [n, q, H, G, D] -> [n, H, G * q, D]
        shaped = taken.reshape(part.rows, part.queries, heads, -1, size).permute(0, 2, 3, 1, 4)
        own = slice(part.first, part.first + part.rows)
        key, value = keys[own, :, : part.keys], values[own, :, : part.keys]
        scores = _scores(shaped.flatten(2, 3), key, scaling, softcap)
        split = scores.view(part.rows, heads, -1, part.queries, part.keys)
        hidden = part.hidden(window)
        if hidden is not None:
            split.masked_fill_(hidden, _MASKED)
        top, total = _exp_in_place(split)
        out = torch.matmul(scores.to(value.dtype), value).float()
        for result, into in (
            (out.view(part.rows, heads, -1, part.queries, size), outs),
            (top, tops),
            (total, sums),
        ):
            # [n, H, G, q, *] -> [n * q, Hq, *]
            flat = result.permute(0, 3, 1, 2, 4).reshape(-1, query_heads, result.shape[-1])
            into.append(flat if part.valid is None else flat[part.valid])
    if len(outs) == 1:
        return outs[0], tops[0], sums[0]
    return torch.cat(outs), torch.cat(tops), torch.cat(sums)


def _attend_prefix(
    group: _Group,
    layer: int,
    query: Tensor,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """query ``[t, Hq, D]`` against one shared prefix; as :func:`_attend_own`."""
    tokens, query_heads, size = query.shape
    key, value = group.prefix.keys[layer][0], group.prefix.values[layer][0]  # [H, P, D]
    heads, prefix_tokens = key.shape[0], key.shape[1]
    step = max(1, _SCORE_BUDGET // (query_heads * prefix_tokens))
    outs: list[Tensor] = []
    tops: list[Tensor] = []
    sums: list[Tensor] = []
    for at in range(0, tokens, step):
        taken = query[at : at + step]
        n = taken.shape[0]
        # [t, H, G, D] -> [H, t * G, D]: one product for every row
        shaped = taken.reshape(n, heads, -1, size).transpose(0, 1).flatten(1, 2)
        scores = _scores(shaped, key, scaling, softcap)
        if window is not None:
            index = group.query_index[at : at + step, None]
            distance = prefix_tokens + index - torch.arange(prefix_tokens, device=index.device)
            scores.view(heads, n, -1, prefix_tokens).masked_fill_(
                (distance >= window)[:, None], _MASKED
            )
        top, total = _exp_in_place(scores)
        out = torch.matmul(scores.to(value.dtype), value).float()
        for result, into in ((out, outs), (top, tops), (total, sums)):
            split = result.view(heads, n, -1, result.shape[-1]).transpose(0, 1)
            into.append(split.reshape(n, query_heads, -1))
    if len(outs) == 1:
        return outs[0], tops[0], sums[0]
    return torch.cat(outs), torch.cat(tops), torch.cat(sums)


def _merge(
    one: tuple[Tensor, Tensor, Tensor], two: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Joins two parts of one softmax; returns the values (not normalised) and the sum."""
    top = torch.maximum(one[1], two[1])
    first, second = (one[1] - top).exp_(), (two[1] - top).exp_()
    return one[0] * first + two[0] * second, one[2] * first + two[2] * second


def serving_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    serving_batch: ServingBatch | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every attention layer.

    Args:
        query: ``[1, Hq, T, D]``; key, value: ``[1, H, T, D]`` of the T new tokens, after RoPE. They
            are written into the row buffers here.
        serving_batch: handed through from the engine's model call.

    Returns:
        ``[1, T, Hq, D]`` and None (no attention weights).

    Raises:
        ConfigError: called without a batch, or with attention sinks.
    """
    if serving_batch is None:
        raise ConfigError(
            f"attention {SERVING_ATTENTION!r} was called outside the serving engine; a model that "
            "serves cannot be used for anything else at the same time"
        )
    if s_aux is not None:
        raise ConfigError("attention sinks (s_aux) are not supported by the embedded server")
    batch = serving_batch
    layer = cast(int, module.layer_idx)
    batch.layers_seen.add(layer)
    for buffers, new in ((batch.buffers.keys, key), (batch.buffers.values, value)):
        tokens = new[0].transpose(0, 1)  # [T, H, D]
        if batch.write_sources is not None:
            tokens = tokens[batch.write_sources]
        buffers[layer][batch.write_slots, :, batch.write_index] = tokens
    by_token = query[0].transpose(0, 1)  # [T, Hq, D]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    own = _attend_own(batch, layer, by_token, scale, softcap, sliding_window)
    out, total = own[0], own[2]
    for group in batch.groups:
        taken = by_token if group.places is None else by_token[group.places]
        shared = _attend_prefix(group, layer, taken, scale, softcap, sliding_window)
        if group.places is None:
            out, total = _merge(own, shared)
        else:
            # A token has one prefix, so groups do not overlap and order does not matter.
            part = (own[0][group.places], own[1][group.places], own[2][group.places])
            merged = _merge(part, shared)
            out[group.places], total[group.places] = merged
    return (out / total).to(query.dtype)[None], None


def register() -> None:
    """Makes the function known to transformers; safe to repeat."""
    AttentionInterface.register(SERVING_ATTENTION, serving_attention)
