"""Keys and values of prompts that come again behind the same prefix: computed once, kept, bounded.

What a token's keys and values are depends on the prefix, the tokens before it and the weights. The
teacher's prefixes (documents) and weights are frozen, and its prompts come again from step to step.
So a prompt's tokens are looked up first, and only what follows the known ones is computed.

A token is kept once for all the prompts that begin with it. The least recently used goes when the
bytes are used up, a token after everything that follows it. Exact to the order of sums: the model
computes fewer tokens at once, and the same products.

The student's prefix changes with each step; nothing of it can be kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cartridge_distill.cartridge.kv_shape import KvShape
from cartridge_distill.model.packing import HostIndex, PackedBatch, on_device
from cartridge_distill.util.errors import ConfigError

Row = tuple[str | None, list[list[int]]]
"""A prefix' name, and sequences behind it that are computed together."""

_Edge = tuple[Hashable, int]
"""What a token follows (a slot, or a prefix at the beginning), and its id."""


class KeptTokens:
    """A store of tokens' keys and values behind any number of prefixes.

    A slot is the place of one token in the store's tensors, which are made at the first use.

    Attributes:
        computed: tokens of prompts that were computed so far.
        found: tokens of prompts that were there and not computed; a token that several sequences of
            a forward have in common counts once.
        evicted: tokens that had to go since the store was empty.

    Args:
        shape: of a token's keys and values.
        dtype: that they are in.
        most_bytes: that they take in all; fewer than one token's keep nothing.
    """

    def __init__(self, shape: KvShape, dtype: torch.dtype, most_bytes: int) -> None:
        self.capacity = max(0, most_bytes) // (shape.numbers * dtype.itemsize)
        self.computed = 0
        self.found = 0
        self._next: dict[_Edge, int] = {}
        # Least recently used first. A token stands behind all that follow it.
        self._edges: OrderedDict[int, _Edge] = OrderedDict()
        self._new: list[int] = []  # not settled yet, a token before all that follow it
        self.evicted = 0
        self._fresh = 0  # slots from here on were never used
        self._free: list[int] = []
        self._reserved: list[int] = []  # of a forward that has not ended
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """Tokens that are kept."""
        return len(self._edges)

    @property
    def bytes(self) -> int:
        """What the store's tensors take; 0 before the first use."""
        return sum(part.nbytes for pair in self._stored.values() for part in pair)

    def clear(self) -> None:
        """Forgets all tokens, and gives the memory back."""
        self._next.clear()
        self._edges.clear()
        self._stored.clear()
        self._free, self._reserved, self._fresh = [], [], 0
        self._new, self.evicted = [], 0

    def behind(self, prefix: str | None, whole: bool = False) -> Kept:
        """The tokens behind one prefix, for a forward.

        Args:
            prefix: a name that stands for it.
            whole: sequences are kept with all their tokens, of which the last is not kept yet.
        """
        return Kept(self, prefix, whole)

    def settled(self) -> None:
        """What is kept now is no longer new."""
        self._new = []

    def new_paths(self) -> list[tuple[str | None, list[int]]]:
        """The longest sequences of ids, behind their prefixes, that end in a new token."""
        parents = {self._edges[slot][0] for slot in self._new if slot in self._edges}
        paths = []
        for slot in self._new:
            if slot in parents or slot not in self._edges:
                continue
            ids: list[int] = []
            last: Hashable = slot
            while isinstance(last, int):
                last, token = self._edges[last]
                ids.append(token)
            assert isinstance(last, tuple)
            paths.append((last[0], ids[::-1]))
        return paths

    def forget_new(self) -> None:
        """Takes the new tokens out. What is left is as it was when :meth:`settled` was called."""
        for slot in self._new:
            if (edge := self._edges.pop(slot, None)) is not None:
                del self._next[edge]
                self._free.append(slot)
        self._new = []

    def _path(self, prefix: str | None, ids: Sequence[int]) -> list[int]:
        """The slots of the longest beginning of ``ids`` that is kept."""
        path: list[int] = []
        last: Hashable = (prefix,)
        for token in ids:
            slot = self._next.get((last, token))
            if slot is None:
                break
            path.append(slot)
            last = slot
        return path

    def _touch(self, path: Sequence[int]) -> None:
        for slot in reversed(path):
            self._edges.move_to_end(slot)

    def _reserve(self, in_use: set[int]) -> int | None:
        """A slot to write to; None when all are in use."""
        if self._free:
            slot = self._free.pop()
        elif self._fresh < self.capacity:
            slot, self._fresh = self._fresh, self._fresh + 1
        else:
            oldest = next(iter(self._edges), None)
            if oldest is None or oldest in in_use:
                return None
            slot = oldest
            del self._next[self._edges.pop(slot)]
            self.evicted += 1
        self._reserved.append(slot)
        return slot

    def _tensors(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[H, capacity, D]`` of a layer.

        Raises:
            ConfigError: the model's are of another kind now.
        """
        if layer not in self._stored:
            shape = (key.shape[0], self.capacity, key.shape[2])
            self._stored[layer] = key.new_empty(shape), value.new_empty(shape)
        stored = self._stored[layer]
        if stored[0].dtype != key.dtype or stored[0].device != key.device:
            raise ConfigError(
                f"layer {layer} makes keys in {key.dtype} on {key.device}, and those of the kept "
                f"prompts are in {stored[0].dtype} on {stored[0].device}: the model was changed; "
                "fix: make a new teacher"
            )
        return stored


@dataclass(frozen=True)
class Kept:
    """The tokens of a store behind one prefix."""

    store: KeptTokens
    prefix: str | None
    whole: bool = False

    def of_row(self, batch: PackedBatch, needed: HostIndex) -> KeptOfRow:
        """Looks a row's sequences up.

        Args:
            batch: B sequences.
            needed: ``[B]`` the place in each sequence from which on tokens are computed whatever
                is kept: somebody asks for their logits, or they are no prompt's.
        """
        store = self.store
        if self.whole:
            needed = np.array(batch.lengths)
        store._free += store._reserved  # of a forward that failed
        store._reserved = []
        ids = batch.ids_on_host.tolist()
        prompts = [
            ids[start : start + count] for start, count in zip(batch.offsets, needed, strict=False)
        ]
        paths = [store._path(self.prefix, prompt) for prompt in prompts]
        for path in paths:
            store._touch(path)
        return KeptOfRow(store, self.prefix, prompts, paths)


class KeptOfRow:
    """What is kept of one row, and what is to be kept of it.

    Keys and values of the row stand behind the kept ones: a number below K is one of those.

    Attributes:
        known: for each sequence the numbers of its first tokens, which are kept.
        count: K.
    """

    def __init__(
        self,
        store: KeptTokens,
        prefix: str | None,
        prompts: list[list[int]],
        paths: list[list[int]],
    ) -> None:
        self._store, self._prefix = store, prefix
        self._prompts, self._paths = prompts, paths
        numbers: dict[int, int] = {}
        for path in paths:
            for slot in path:
                numbers.setdefault(slot, len(numbers))
        self.known = [[numbers[slot] for slot in path] for path in paths]
        self.count = len(numbers)
        self._slots = np.fromiter(numbers, dtype=np.int64, count=len(numbers))
        self._in_use = set(numbers)
        self._new: dict[_Edge, int] = {}
        self._computed = 0
        self._places: HostIndex = np.zeros(0, dtype=np.int64)
        self._on_device: dict[str, Tensor] = {}

    def plan(self, of_token: HostIndex, offsets: HostIndex) -> None:
        """Chooses what of the row is kept, before the model runs.

        Args:
            of_token: ``[T]`` the number of each token of the row.
            offsets: ``[B + 1]``, where each sequence begins.
        """
        store = self._store
        places: list[int] = []
        computed: set[int] = set()
        for prompt, path, start in zip(self._prompts, self._paths, offsets, strict=False):
            numbers = of_token[start + len(path) : start + len(prompt)].tolist()
            computed.update(numbers)
            last: Hashable = path[-1] if path else (self._prefix,)
            for token, number in zip(prompt[len(path) :], numbers, strict=True):
                edge = (last, token)
                slot = self._new.get(edge)
                if slot is None:
                    slot = store._reserve(self._in_use)
                    if slot is None:
                        break
                    self._new[edge] = slot
                    places.append(number - self.count)
                path.append(slot)
                last = slot
        self._computed = len(computed)
        self._places = np.array(places, dtype=np.int64)

    def take(self, layer: int, key: Tensor, value: Tensor, owner: bool) -> tuple[Tensor, Tensor]:
        """The row's keys and values behind the kept ones; stores what is new.

        Args:
            layer: of the prefix.
            key, value: ``[H, U, D]`` of the computed tokens.
            owner: the layer made them itself; others read them again.

        Returns:
            ``[H, K + U, D]``, twice.
        """
        if not self._new and not self.count:
            return key, value
        stored = self._store._tensors(layer, key, value)
        if owner and self._new:
            places, slots = self._index("places", key), self._index("new", key)
            for kept, own in zip(stored, (key, value), strict=True):
                kept[:, slots] = own.detach()[:, places]
        if not self.count:
            return key, value
        slots = self._index("slots", key)
        known = [kept[:, slots] for kept in stored]
        return torch.cat([known[0], key], dim=1), torch.cat([known[1], value], dim=1)

    def keep(self) -> None:
        """After the forward: from here on the new tokens are found."""
        store = self._store
        for edge, slot in self._new.items():
            store._next[edge] = slot
            store._edges[slot] = edge
        store._new += self._new.values()
        store._reserved = []
        for path in self._paths:
            store._touch(path)
        store.computed += self._computed
        store.found += self.count

    def _index(self, name: str, like: Tensor) -> Tensor:
        if name not in self._on_device:
            host = {
                "places": self._places,
                "slots": self._slots,
                "new": np.fromiter(self._new.values(), dtype=np.int64, count=len(self._new)),
            }[name]
            self._on_device[name] = on_device(host, like.device, torch.long)
        return self._on_device[name]
