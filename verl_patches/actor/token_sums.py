"""Means over a step's tokens, exact over micro-batches and ranks.

veRL averages a micro-batch's numbers with equal weights, so that a micro-batch of few tokens counts
as much as one of many, and one without any general row would have to make up a number. Here each
micro-batch adds sums and counts, and the step divides.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed
from torch import Tensor

from cartridge_distill.distill.overlap import Overlap
from cartridge_distill.model.packing import HostMask, on_device

# metric -> (what is summed, what counts); a metric whose count is 0 in the step is left out
_RATIOS = {
    "student_entropy": ("entropy", "tokens"),
    "topk_overlap": ("overlap", "tokens"),
    "topk_overlap_mass": ("overlap_mass", "tokens"),
    "loss_clipped": ("clipped", "counted"),
    "loss_document": ("loss_document", "counted_document"),
    "loss_general": ("loss_general", "counted_general"),
}
_TOTALS = {
    "trained_tokens/document": "counted_document",
    "trained_tokens/general": "counted_general",
}
_NAMES = (
    *("tokens", "counted", "counted_document", "counted_general"),
    *("entropy", "overlap", "overlap_mass", "clipped", "loss_document", "loss_general"),
)
PREFIX = "sum/"


def token_sums(
    overlap: Overlap, token_loss: Tensor, clipped: Tensor, counted: Tensor, general: HostMask
) -> dict[str, Tensor]:
    """What one micro-batch adds, on the device, to be fetched.

    Args:
        token_loss, clipped, counted: ``[N]``, see ``TokenLoss``.
        general: ``[N]`` bool, the tokens of samples without a document.
    """
    bare = on_device(general, token_loss.device)
    loss = token_loss.detach()
    sums = {
        "tokens": torch.ones_like(loss).sum(),
        "counted": counted.sum(),
        "counted_document": (counted & ~bare).sum(),
        "counted_general": (counted & bare).sum(),
        "entropy": overlap.entropy.sum(),
        "overlap": overlap.share.sum(),
        "overlap_mass": overlap.mass.sum(),
        "clipped": clipped.sum(),
        "loss_document": (loss * ~bare).sum(),
        "loss_general": (loss * bare).sum(),
    }
    return {f"{PREFIX}{name}": value for name, value in sums.items()}


class StepSums:
    """The sums of one engine's step."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys(_NAMES, 0.0)

    def begin(self) -> None:
        """Before the first micro-batch."""
        self._sums = dict.fromkeys(_NAMES, 0.0)

    def add(self, found: dict[str, float]) -> None:
        """Takes a micro-batch's sums out of its fetched numbers."""
        for name in _NAMES:
            self._sums[name] += found.pop(f"{PREFIX}{name}")

    def means(self, device: torch.device) -> dict[str, float]:
        """Of the step, the same on every rank; all ranks call it together."""
        return _divided(self._over_ranks(device))

    def _over_ranks(self, device: torch.device) -> Mapping[str, float]:
        # A plain loop (training/study) has no process group.
        alone = not torch.distributed.is_initialized()
        if alone or torch.distributed.get_world_size() == 1:
            return self._sums
        # Not float64 everywhere: a platform may have none. Sums of a step are well inside float32.
        together = torch.tensor([self._sums[name] for name in _NAMES], device=device)
        torch.distributed.all_reduce(together)
        return dict(zip(_NAMES, together.tolist(), strict=True))


def _divided(sums: Mapping[str, float]) -> dict[str, float]:
    means = {
        name: sums[above] / sums[below] for name, (above, below) in _RATIOS.items() if sums[below]
    }
    return means | {name: sums[key] for name, key in _TOTALS.items()}
