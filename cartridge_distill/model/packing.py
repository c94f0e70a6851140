"""Ragged sequences in one packed row, told apart by ``seq_ids``.

Nothing is padded: a batch of B sequences is a row of T = sum(lengths) tokens. Whether token i may
see token j is decided by ``seq_ids`` (same sequence) and ``index`` (not later); prefix tokens carry
``seq_id = -1`` and are open to all. Tokens are taken by mask, never by ``[:length]``.

Token ids live on the device. Which token is which is known from the lengths alone, so it lives on
the host, in numpy arrays: no step of a packed forward has to wait for a GPU to tell where a
sequence ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HostMask = NDArray[np.bool_]
HostIndex = NDArray[np.int64]


def host_mask(mask: Tensor | HostMask) -> HostMask:
    """A bool mask as numpy. A tensor on a GPU is fetched, for which the host waits.

    Raises:
        ValueError: it is not bool, or not 1-D.
    """
    found = mask.numpy(force=True) if isinstance(mask, Tensor) else mask
    if found.dtype != np.bool_ or found.ndim != 1:
        raise ValueError(f"a mask is 1-D and bool; got {found.dtype} of shape {found.shape}")
    return found


def on_device(
    values: Tensor | NDArray[np.generic] | Sequence[int],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What the host holds, on a device; the host does not wait for the copy."""
    host = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    host = host.to(dtype=dtype or host.dtype)
    if device.type == "cuda" and host.device.type == "cpu":
        host = host.pin_memory()  # from other memory the driver may wait for the device first
    return host.to(device, non_blocking=True)


@dataclass(frozen=True)
class PackedBatch:
    """B sequences in one row.

    Attributes:
        input_ids: ``[T]`` long, the sequences one after the other, on any device.
        lengths: B lengths, each at least 1.
    """

    input_ids: Tensor
    lengths: tuple[int, ...]
    _known_ids: HostIndex | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.input_ids.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the row is."""
        return self.input_ids.device

    @cached_property
    def ids_on_host(self) -> HostIndex:
        """``[T]`` the ids; fetched when they were packed on a GPU."""
        if self._known_ids is not None:
            return self._known_ids
        found: HostIndex = self.input_ids.numpy(force=True)
        return found

    @cached_property
    def seq_ids(self) -> HostIndex:
        """``[T]``, 0..B-1."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def index(self) -> HostIndex:
        """``[T]``, the place of a token within its sequence, from 0."""
        return np.arange(self.num_tokens) - self.offsets[self.seq_ids]

    @cached_property
    def offsets(self) -> HostIndex:
        """``[B + 1]``, where each sequence begins; the last entry is T."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch elsewhere; the host does not wait for the copy."""
        known = self.ids_on_host if self.device.type == "cpu" else self._known_ids
        return PackedBatch(on_device(self.input_ids, device), self.lengths, known)

    def tokens(self, mask: Tensor | HostMask) -> Tensor:
        """``[n]`` ids of the tokens that a ``[T]`` mask names, on the batch's device."""
        return self.input_ids[self.places(mask)]

    def places(self, mask: Tensor | HostMask) -> Tensor:
        """``[n]`` long, the places of the true entries of a ``[T]`` mask, on the device."""
        return on_device(np.flatnonzero(self.mask(mask)), self.device, torch.long)

    def mask(self, mask: Tensor | HostMask) -> HostMask:
        """A ``[T]`` mask on the host.

        Raises:
            ValueError: it is not bool, or not one entry a token.
        """
        found = host_mask(mask)
        if len(found) != self.num_tokens:
            raise ValueError(
                f"a mask of {len(found)} entries, and the row has {self.num_tokens} tokens"
            )
        return found

    def predicts(self, response_mask: Tensor | HostMask) -> HostMask:
        """Which rows of the logits predict the tokens of ``response_mask``.

        The logits at token i are the distribution of token i + 1 of the same sequence.

        Args:
            response_mask: ``[T]`` bool, the tokens whose log-probs are asked for.

        Returns:
            ``[T]`` bool with as many true entries, in the same order.

        Raises:
            ValueError: the first token of a sequence counts; nothing precedes it.
        """
        response_mask = self.mask(response_mask)
        first = response_mask & (self.index == 0)
        if first.any():
            raise ValueError(
                f"sequences {self.seq_ids[first].tolist()}: the first token has no predecessor to "
                "predict it; a prompt needs at least one token"
            )
        return np.roll(response_mask, -1)

    def up_to_last(self, logit_mask: Tensor | HostMask) -> tuple[PackedBatch, HostMask]:
        """Leaves out what no kept row depends on: whatever follows a sequence's last one.

        Of a prompt with a response that is its last token, whose own prediction nobody asks for.

        Args:
            logit_mask: ``[T]`` bool, the rows whose logits are asked for.

        Returns:
            The shorter batch, without the sequences of which nothing is kept, and its
            ``logit_mask``.
        """
        logit_mask = self.mask(logit_mask)
        if not logit_mask.any():
            return self, logit_mask
        last = np.full(len(self.lengths), -1)
        np.maximum.at(last, self.seq_ids[logit_mask], self.index[logit_mask])
        needed = self.index <= last[self.seq_ids]
        if needed.all():
            return self, logit_mask
        lengths = tuple(int(place) + 1 for place in last if place >= 0)
        known = None if self._known_ids is None else self._known_ids[needed]
        return PackedBatch(self.input_ids[self.places(needed)], lengths, known), logit_mask[needed]

    def filled_up(self, multiple: int, at_least: int) -> PackedBatch:
        """With more sequences of zeros behind the others, to a multiple of tokens.

        The other sequences do not see them. Kernels that are compiled for whole blocks then meet
        whole blocks only. None is longer than the longest that is there: a position that no real
        token has could be beyond the model's context, or change how it scales its positions.
        """
        most = max(at_least, -(-self.num_tokens // multiple) * multiple)
        missing = most - self.num_tokens
        if not missing:
            return self
        zeros = self.input_ids.new_zeros(missing)
        longest = max(self.lengths)
        whole, rest = divmod(missing, longest)
        filling = (longest,) * whole + ((rest,) if rest else ())
        return PackedBatch(torch.cat([self.input_ids, zeros]), (*self.lengths, *filling))


def pack(sequences: Sequence[Tensor]) -> PackedBatch:
    """Packs 1-D token id tensors into one row.

    Raises:
        ValueError: no sequence, an empty one, or one that is not 1-D or holds no whole numbers.
    """
    if not sequences:
        raise ValueError("pack() needs at least one sequence")
    for number, sequence in enumerate(sequences):
        if sequence.dim() != 1 or sequence.numel() == 0:
            raise ValueError(
                f"sequence {number} has shape {tuple(sequence.shape)}; expected [length >= 1]"
            )
        if sequence.is_floating_point() or sequence.dtype == torch.bool:
            raise ValueError(f"sequence {number} holds {sequence.dtype}; ids are whole numbers")
    lengths = tuple(int(sequence.numel()) for sequence in sequences)
    return PackedBatch(torch.cat(list(sequences)).long(), lengths)
