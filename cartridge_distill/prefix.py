"""A key/value prefix: what a cartridge and a document's KV have in common.

Student and teacher run the same forward; they differ by the prefix alone. This module holds the
plain data and how it is computed from tokens. Trainability lives in ``cartridge``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cartridge_distill.errors import CartridgeFormatError
from cartridge_distill.kv_shape import KvShape


@dataclass(frozen=True)
class Prefix:
    """Keys and values of P tokens, per layer, visible to every token of a packed batch.

    Attributes:
        keys: L tensors ``[1, H, P, D]``, after RoPE at positions 0..P-1.
        values: L tensors ``[1, H, P, D]``.

    Raises:
        CartridgeFormatError: the layers disagree in number or shape.
    """

    keys: list[Tensor]
    values: list[Tensor]

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.values) or not self.keys:
            raise CartridgeFormatError(
                f"a prefix needs as many key as value layers, at least one: "
                f"got {len(self.keys)} and {len(self.values)}"
            )
        token_counts = {
            tensor.shape[2] for tensor in (*self.keys, *self.values) if tensor.dim() == 4
        }
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            if key.dim() != 4 or key.shape[0] != 1 or key.shape != value.shape:
                raise CartridgeFormatError(
                    f"layer {layer}: keys {tuple(key.shape)} and values {tuple(value.shape)} "
                    "must both be [1, kv_heads, tokens, head_dim]"
                )
        if len(token_counts) != 1:
            raise CartridgeFormatError(
                f"layers hold different token counts: {sorted(token_counts)}"
            )

    @property
    def num_tokens(self) -> int:
        return self.keys[0].shape[2]

    @property
    def kv_shape(self) -> KvShape:
        key = self.keys[0]
        return KvShape(len(self.keys), key.shape[1], key.shape[3])

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Prefix:
        """The same prefix elsewhere or in another dtype; differentiable."""
        return Prefix(
            [key.to(device=device, dtype=dtype) for key in self.keys],
            [value.to(device=device, dtype=dtype) for value in self.values],
        )

    def as_cache(self) -> DynamicCache:
        """A growing transformers cache that begins with this prefix, for ``model.generate``."""
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(key, value, layer)
        return cache


PREFILL_TOKENS = 8192
"""Tokens of a long document that go through the model at once: bounds the activations."""


@torch.no_grad()
def prefix_from_tokens(
    model: nn.Module, input_ids: Tensor, backend: str = "auto", at_once: int = PREFILL_TOKENS
) -> Prefix:
    """The KV of a forward over ``input_ids``.

    Args:
        model: a model from :func:`cartridge_distill.models.load_model`.
        input_ids: ``[P]`` token ids, the begin-of-text token included where the model has one.
        backend: attention backend, see :mod:`cartridge_distill.attention`.
        at_once: a longer document is computed in pieces of so many tokens, each behind the KV of
            those before it.

    Returns:
        A prefix of P tokens in the model's dtype, detached.
    """
    from cartridge_distill.forward import run_packed
    from cartridge_distill.packing import pack

    total, done = len(input_ids), 0
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for piece in input_ids.split(at_once):
        cache = DynamicCache()  # without a config: keeps every token, also on windowed layers
        last = np.arange(len(piece)) == len(piece) - 1  # no logits are wanted: one row of them
        so_far = [[kept[:, :, :done] for kept in kind] for kind in (keys, values)]
        before = Prefix(*so_far) if done else None
        run_packed(model, before, pack([piece]), keep=last, backend=backend, cache=cache)
        for kind, name in ((keys, "keys"), (values, "values")):
            new = [getattr(layer, name)[:, :, : len(piece)].detach() for layer in cache.layers]
            if not done:
                # Memory of the whole at once. A copy besides: what a backend filled a row up with
                # is given back.
                kind += [part.new_empty(*part.shape[:2], total, part.shape[3]) for part in new]
            for kept, part in zip(kind, new, strict=True):
                kept[:, :, done : done + len(piece)] = part
        done += len(piece)
    return Prefix(keys, values)
