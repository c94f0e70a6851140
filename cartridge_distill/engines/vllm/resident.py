"""Cartridges on the device, within a bound: the least recently used go first.

What lies in vLLM's own cache is vLLM's affair; these are the copies from which its blocks are
filled when a version is new, or was pushed out.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cartridge_distill.engines.vllm.placing import heads_of_rank
from cartridge_distill.engines.vllm.wanted import Misused, Wanted

# vLLM shows what its own loggers say, and these are below them.
logger = logging.getLogger("vllm.cartridges")

Read = Callable[[Wanted], tuple[list[Tensor], list[Tensor]]]


@dataclass(frozen=True)
class DeviceKv:
    """One cartridge as a rank writes it: L keys and values, ``[P, H of the rank, D]`` each."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


class Residents:
    """Cartridges by their content.

    Args:
        read: gives the keys and values of a request's cartridges, ``[1, H, P, D]`` a layer.
        device, dtype: of the copies.
        rank, ranks: of the tensor-parallel group.
        max_bytes: bound on the copies; one cartridge always fits.
    """

    def __init__(
        self,
        read: Read,
        device: torch.device,
        dtype: torch.dtype,
        rank: int,
        ranks: int,
        max_bytes: int,
    ) -> None:
        self._read = read
        self._device, self._dtype = device, dtype
        self._rank, self._ranks = rank, ranks
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, DeviceKv] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        return sum(one.num_bytes for one in self._kept.values())

    def get(self, wanted: Wanted) -> DeviceKv:
        """The cartridges of a request; read where they are not resident.

        Raises:
            Misused: they have another number of tokens than the request says.
            Whatever ``read`` raises.
        """
        found = self._kept.get(wanted.content)
        if found is None:
            found = self._load(wanted)
        else:
            self._kept.move_to_end(wanted.content)
        # Slots are counted by what the request says.
        if len(found.keys[0]) != wanted.tokens:
            raise Misused(
                f"{' + '.join(wanted.ids)}: {len(found.keys[0])} tokens, the request says "
                f"{wanted.tokens}"
            )
        return found

    def _load(self, wanted: Wanted) -> DeviceKv:
        keys, values = ([self._mine(t) for t in side] for side in self._read(wanted))
        size = sum(t.numel() for t in (*keys, *values)) * self._dtype.itemsize
        # Room first: the new one must not come on top of a full house.
        while self._kept and self.num_bytes + size > self._max_bytes:
            self._kept.popitem(last=False)
        made = DeviceKv([self._placed(t) for t in keys], [self._placed(t) for t in values])
        self._kept[wanted.content] = made
        logger.info("loaded cartridge %s: %d tokens", " + ".join(wanted.ids), wanted.tokens)
        return made

    def _mine(self, tensor: Tensor) -> Tensor:
        """``[1, H, P, D]`` as the rank's ``[P, H', D]``."""
        heads = heads_of_rank(tensor.shape[1], self._rank, self._ranks)
        return tensor[0, heads].transpose(0, 1)

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype).contiguous().to(self._device)
