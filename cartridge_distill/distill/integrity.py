"""Proof that frozen weights stayed frozen: a checksum that runs on the weights' own device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_INT_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach().contiguous().view(-1).view(_INT_OF_SIZE[tensor.element_size()])


@torch.no_grad()
def weights_checksum(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Per parameter: the sum of its bit patterns, and of a position-weighted half of them.

    Any single changed bit changes the first number; swapped values change the second. Nothing is
    copied off the device, so a 3B model takes well under a second on a GPU.
    """
    sums = {}
    for name, parameter in module.named_parameters():
        bits = _bits(parameter)
        plain = int(bits.sum(dtype=torch.int64))
        odd = int(bits[1::2].sum(dtype=torch.int64))
        sums[name] = (plain, odd)
    return sums
