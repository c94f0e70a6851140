"""Linear layers of a frozen float32 model on a CPU, by oneDNN.

torch gives a float32 ``nn.Linear`` on x86 to MKL. MKL chooses its kernels by the vendor of the CPU
and takes a general AVX2 path on any but Intel's. oneDNN, in the same torch, generates kernels for
the instructions that are there: on an AMD EPYC with AVX-512 more than twice as fast, forward and
backward, and nearly three times for a few rows against a vocabulary
(``benchmarks/linear.py`` prints both). Same float32, same result up to the order of the
sums.

The layers stay ``nn.Linear`` with their own weights: only how they multiply changes. What this does
not suit (a GPU, another dtype, weights that are trained, Intel) goes torch's own way.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@functools.cache
def onednn_is_faster(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this is a CPU on which MKL takes its general path, and torch has oneDNN's product.

    Args:
        cpuinfo: as Linux writes it; where there is none, the answer is no.
    """
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkl.is_available():
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return False
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    return "vendor_id" in text and "GenuineIntel" not in text


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., in] @ weight [out, in].T + bias``. The weight may be a transposed view."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


LEAST_ROWS = 16
"""Of fewer, torch's own product is as fast as oneDNN's, and is begun sooner."""


def rows_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x [M, K] @ weight [N, K].T`` by whichever is faster here; no gradients.

    Args:
        x, weight: either may be a transposed view.
    """
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if plain and x.shape[0] >= LEAST_ROWS and onednn_is_faster():
        return _product(x, weight, None)
    return torch.mm(x, weight.t())


LEAST_NUMBERS = 2**17
"""Of a head's product with fewer, one product of all heads is begun sooner."""


def by_head_product(x: Tensor, other: Tensor) -> Tensor:
    """``x [H, M, K] @ other [H, K, N]`` by whichever is faster here; no gradients."""
    is_large = x.shape[1] * other.shape[2] >= LEAST_NUMBERS
    is_plain = x.device.type == "cpu" and x.dtype == other.dtype == torch.float32
    if not (is_large and is_plain and onednn_is_faster()):
        return torch.matmul(x, other)
    found = x.new_empty(*x.shape[:2], other.shape[2])
    for head, one in enumerate(x):
        found[head] = _product(one, other[head].t(), None)
    return found


class _FrozenProduct(torch.autograd.Function):
    """The product, with a gradient for its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        found = _product(x, weight, bias)
        # oneDNN hands out a view of what it made. Models write into a linear layer's output
        # (Gemma 3n scales it in place), which autograd forbids for a view from in here.
        return cast(Tensor, torch.ops.aten._unsafe_view(found, found.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(grad.contiguous(), weight.t(), None), None, None


class FrozenLinear(nn.Linear):
    """An ``nn.Linear`` whose weights get no gradient."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        plain = input.device.type == "cpu" and input.dtype == weight.dtype == torch.float32
        if trained or not plain or input.numel() == 0 or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        if not (torch.is_grad_enabled() and input.requires_grad):
            return _product(input, weight, bias)
        found: Tensor = _FrozenProduct.apply(input, weight, bias)
        return found


def use_frozen_linear(model: nn.Module) -> None:
    """Turns a model's plain linear layers into :class:`FrozenLinear`, in place."""
    # oneDNN and torch's wrapper of it each keep the kernels of the last 1,024 shapes, over half a
    # gigabyte (tests/model/test_frozen_linear.py). Here nearly every batch has a new number of
    # tokens: what one step uses again is enough. Both read their variable at the first product.
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FrozenLinear


def use_torch_linear(model: nn.Module) -> None:
    """Takes :func:`use_frozen_linear` back; for comparing the two."""
    for module in model.modules():
        if type(module) is FrozenLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
