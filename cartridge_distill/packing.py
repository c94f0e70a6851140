"""Ragged sequences in one packed row, told apart by ``seq_ids``.

Nothing is padded: a batch of B sequences is a row of T = sum(lengths) tokens. Whether token i may
see token j is decided by ``seq_ids`` (same sequence) and ``index`` (not later); prefix tokens carry
``seq_id = -1`` and are open to all. Tokens are taken by mask, never by ``[:length]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """B sequences in one row.

    Attributes:
        input_ids: ``[T]`` long, the sequences one after the other.
        seq_ids: ``[T]`` long, 0..B-1.
        index: ``[T]`` long, the place of a token within its sequence, from 0.
        lengths: B lengths, each at least 1.
    """

    input_ids: Tensor
    seq_ids: Tensor
    index: Tensor
    lengths: list[int]

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def offsets(self) -> list[int]:
        """Where each sequence begins; the last entry is T."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        return starts

    def to(self, device: torch.device | str) -> PackedBatch:
        return PackedBatch(
            self.input_ids.to(device), self.seq_ids.to(device), self.index.to(device), self.lengths
        )

    def predicts(self, wanted: Tensor) -> Tensor:
        """Which rows of the logits predict the ``wanted`` tokens.

        The logits at token i are the distribution of token i + 1 of the same sequence.

        Args:
            wanted: ``[T]`` bool, the tokens whose log-probs are asked for.

        Returns:
            ``[T]`` bool with as many true entries, in the same order.

        Raises:
            ValueError: the first token of a sequence is wanted; nothing precedes it.
        """
        if bool((wanted & (self.index == 0)).any()):
            bad = self.seq_ids[wanted & (self.index == 0)].tolist()
            raise ValueError(
                f"sequences {bad}: the first token has no predecessor to predict it; "
                "a prompt needs at least one token"
            )
        return torch.roll(wanted, -1, dims=0)

    def up_to_last(self, keep: Tensor) -> tuple[PackedBatch, Tensor]:
        """Leaves out what no kept row depends on: whatever follows a sequence's last one.

        Of a prompt with a response that is its last token, whose own prediction nobody asks for.

        Args:
            keep: ``[T]`` bool, the rows whose logits are asked for.

        Returns:
            The shorter batch, without the sequences of which nothing is kept, and ``keep`` for it.
        """
        if not bool(keep.any()):
            return self, keep
        places = torch.where(keep, self.index, -1)
        none = torch.full((len(self.lengths),), -1, device=keep.device)
        last = none.scatter_reduce(0, self.seq_ids, places, reduce="amax")
        needed = self.index <= last[self.seq_ids]
        lengths = [place + 1 for place in last.tolist() if place >= 0]
        counts = torch.tensor(lengths, device=keep.device)
        seq_ids = torch.repeat_interleave(torch.arange(len(lengths), device=keep.device), counts)
        batch = PackedBatch(self.input_ids[needed], seq_ids, self.index[needed], lengths)
        return batch, keep[needed]


def pack(sequences: Sequence[Tensor]) -> PackedBatch:
    """Packs 1-D token id tensors into one row.

    Raises:
        ValueError: no sequence, an empty one, or one that is not 1-D.
    """
    if not sequences:
        raise ValueError("pack() needs at least one sequence")
    for number, sequence in enumerate(sequences):
        if sequence.dim() != 1 or sequence.numel() == 0:
            raise ValueError(
                f"sequence {number} has shape {tuple(sequence.shape)}; expected [length >= 1]"
            )
    lengths = [int(sequence.numel()) for sequence in sequences]
    device = sequences[0].device
    counts = torch.tensor(lengths, device=device)
    seq_ids = torch.repeat_interleave(torch.arange(len(lengths), device=device), counts)
    starts = torch.cumsum(counts, 0) - counts
    index = torch.arange(sum(lengths), device=device) - starts[seq_ids]
    return PackedBatch(torch.cat(list(sequences)).long(), seq_ids, index, lengths)
