"""A key/value prefix: what a cartridge and a document's KV have in common.

Student and teacher run the same forward; they differ by the prefix alone. This module holds the
plain data and how it is computed from tokens. Trainability lives in ``cartridge``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from cartridge_distill.cartridge.kv_shape import KvShape
from cartridge_distill.util.errors import CartridgeFormatError


@dataclass(frozen=True)
class Prefix:
    """Keys and values of P tokens, per layer, visible to every token of a packed batch.

    Attributes:
        keys: L tensors ``[1, H, P, D]``, after RoPE at positions 0..P-1; H and D may differ from
            layer to layer.
        values: L tensors of the same shapes.

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
        """P."""
        return self.keys[0].shape[2]

    @property
    def kv_shape(self) -> KvShape:
        """Layers, heads and head sizes."""
        heads = tuple(key.shape[1] for key in self.keys)
        return KvShape(len(self.keys), heads, tuple(key.shape[3] for key in self.keys))

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
