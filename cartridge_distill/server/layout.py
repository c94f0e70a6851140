"""Where the tokens of one serving forward lie: rows, their buffers, segments and prefix groups.

A forward takes a packed row of T tokens: whole prompts, pieces of prompts and single decoded tokens
of up to ``max_batch`` rows, mixed. Each row's own keys and values lie in buffers ``[S, H, C, D]``.
Neighbouring rows of like length go through one product (a *segment*), so decoding is a single
product over a view of the buffers; the rows behind one cartridge are a *group*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.util.errors import ConfigError

# Scores held at once, in elements: 32 Mi floats are 128 MiB.
SCORE_BUDGET = 32 * 1024 * 1024
# Rows share a segment while padding costs less than this, or less than starting another product.
_PADDING_RATIO = 1.35
_SEGMENT_OVERHEAD = 2048


class RowBuffers:
    """Own keys and values of the rows in flight, per layer ``[S, H, C, D]``; row i lies in slot i.

    Slots in use are always 0..n-1, so that any run of neighbours is a view.

    Args:
        layers: H and D of each decoder layer.
    """

    def __init__(
        self, layers: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layers = list(layers)
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

        def grown(layer: int, old: Tensor | None) -> Tensor:
            heads, size = self._layers[layer]
            shape = (new_slots, heads, new_capacity, size)
            # Zeros, not empty: masked places enter products with weight 0, and 0 * NaN is NaN.
            new = torch.zeros(shape, dtype=self._dtype, device=self._device)
            if old is not None and used:
                new[:used, :, :kept] = old[:used, :, :kept]
            return new

        for layer in range(len(self._layers)):
            if self.slots == 0:
                self.keys.append(grown(layer, None))
                self.values.append(grown(layer, None))
            else:
                self.keys[layer] = grown(layer, self.keys[layer])
                self.values[layer] = grown(layer, self.values[layer])
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
class Segment:
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
class Group:
    """The tokens ``places`` (None: all) of the rows that share one prefix."""

    prefix: Prefix
    places: Tensor | None
    query_index: Tensor  # [t]


class ServingBatch:
    """One forward's layout; travels with the model call and is shared by all layers."""

    def __init__(
        self,
        parts: Sequence[RowPart],
        buffers: RowBuffers,
        query_heads: int,
        kv_sources: Sequence[int] | None = None,
    ) -> None:
        """``parts`` in slot order; ``kv_sources`` as :class:`PackedLayout` has them."""
        self.buffers = buffers
        self.kv_sources = range(len(buffers.keys)) if kv_sources is None else kv_sources
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

    def _segments(self, parts: Sequence[RowPart], device: torch.device) -> list[Segment]:
        segments: list[Segment] = []
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
                    or padded * self.query_heads > SCORE_BUDGET
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
    ) -> Segment:
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
        return Segment(
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

    def _groups(self, parts: Sequence[RowPart], device: torch.device) -> list[Group]:
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
            groups.append(Group(prefixes[key], where, index))
        return groups

    def check_used_by_all(self, num_layers: int) -> None:
        """Raises ConfigError when a layer computed its attention elsewhere."""
        missing = sorted(set(range(num_layers)) - self.layers_seen)
        if missing:
            raise ConfigError(
                f"layers {missing} did not use the serving attention; this model class is not "
                "supported by the embedded server; fix: use another model"
            )
