"""Log-probs of a model in bfloat16 without its rounding: the same weights, computed in float32.

No second model: each product takes its weights over as it needs them, so memory grows by one
layer's largest matrix. The cartridge is rounded to what is served first. Slow on a GPU, and meant
for a bounded number of tokens (:func:`leading`), to tell two versions of a cartridge apart that
differ by less than the rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.logprobs import chosen_logprobs
from cartridge_distill.model.packing import HostMask, host_mask, pack

PACKED_TOKENS = 512
"""Tokens that a check may cost: two forwards of so many in float32, each step."""

COUNTED_TOKENS = 64
"""Tokens that a check wants to compare."""


# Of torch versions that have them.
_GROUPED = ((torch, "_grouped_mm"), (functional, "grouped_mm"))


class InFloat32(TorchFunctionMode):
    """Embeddings come out in float32, and products and layer norms take their weights in it.

    What lies between (other norms, attention, activations) goes on in the dtype it is given.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            args = tuple(_widened(value) for value in args)
            kwargs = {name: _widened(value) for name, value in kwargs.items()}
        found = func(*args, **kwargs)
        return _widened(found) if func is functional.embedding else found


# Of linear layers, convolutions (GPT-2's, short ones), and experts, which have one for all. A
# layer norm wants its weights in the dtype of what it is given, too.
_PRODUCTS = {
    *(functional.linear, functional.conv1d, torch.conv1d),
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm),
    *(torch.addmm, torch.baddbmm, torch.einsum),
    *(functional.layer_norm, torch.layer_norm),
    *(getattr(where, name) for where, name in _GROUPED if hasattr(where, name)),
}


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def leading(sequences: Sequence[Tensor], response_masks: Sequence[HostMask]) -> int:
    """How many sequences a check takes, from the first on; at least one.

    As many as have :data:`PACKED_TOKENS`, or more where that leaves fewer than
    :data:`COUNTED_TOKENS` that count.
    """
    taken, tokens, counted = 0, 0, 0
    for sequence, mask in zip(sequences, response_masks, strict=True):
        tokens += int(sequence.numel())
        if taken and tokens > PACKED_TOKENS and counted >= COUNTED_TOKENS:
            break
        counted += int(mask.sum())
        taken += 1
    return taken


@torch.no_grad()
def float32_logprobs(
    model: nn.Module,
    prefix: Prefix,
    sequences: Sequence[Tensor],
    response_masks: Sequence[Tensor | HostMask],
    temperature: float,
    served: torch.dtype,
) -> Tensor:
    """Log-probs ``[N]`` of the counted tokens.

    Args:
        model: from :func:`cartridge_distill.model.loading.load_model`, in any dtype.
        prefix: the cartridge; it is rounded to ``served``.
        sequences: B ``[length]`` id tensors, on the host.
        response_masks: B ``[length]`` bool masks, on the host.
        temperature: logits are divided by it; 0 leaves them alone.
        served: the number format that the server has the cartridge in.

    Raises:
        ConfigError: as :func:`cartridge_distill.model.forward.packed_forward`.
    """
    batch = pack(sequences).to(prefix.keys[0].device)
    mask = np.concatenate([host_mask(some) for some in response_masks])
    rounded = prefix.to(dtype=served).to(dtype=torch.float32)
    with InFloat32():
        # Plain products on every device: another kernel would be compiled for another dtype.
        logits = packed_forward(model, rounded, batch, batch.predicts(mask), backend="grouped")
    return chosen_logprobs(logits, batch.tokens(mask), temperature)
