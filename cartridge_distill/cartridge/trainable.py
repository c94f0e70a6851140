"""The cartridge: a trainable KV prefix with a few frozen tokens in front.

Master weights are float32 whatever the model computes in; the forward casts them, so gradients and
the optimizer's state stay in float32. Reading and writing files lives in ``checkpoint``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cartridge_distill.cartridge.kv_shape import KvShape
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.util.errors import ConfigError


class TrainableCache(nn.Module):
    """Keys and values of P tokens per layer, the first ``num_frozen_tokens`` of them frozen.

    Tensor names are those of the field's files: ``frozen_keys``, ``frozen_values``,
    ``trainable_keys``, ``trainable_values``, one ``[1, H, tokens, D]`` per layer.

    One that begins as a document's first tokens needs a model, and is made by
    :func:`cartridge_distill.model.beginning.first_cartridge`.

    Args:
        prefix: the initial P tokens.
        num_frozen_tokens: at least 1 (an attention sink; neither upstream nor Tokasaurus can read
            a cartridge without one) and less than P.

    Raises:
        ConfigError: a frozen count outside 1..P-1.
    """

    def __init__(self, prefix: Prefix, num_frozen_tokens: int = 1) -> None:
        super().__init__()
        if not 1 <= num_frozen_tokens < prefix.num_tokens:
            raise ConfigError(
                f"num_frozen_tokens={num_frozen_tokens} of {prefix.num_tokens} tokens; "
                f"fix: give 1 to {prefix.num_tokens - 1}"
            )
        cut = num_frozen_tokens

        def part(
            tensors: list[Tensor], start: int, end: int | None, train: bool
        ) -> nn.ParameterList:
            return nn.ParameterList(
                nn.Parameter(tensor[:, :, start:end].detach().float().clone(), requires_grad=train)
                for tensor in tensors
            )

        self.frozen_keys = part(prefix.keys, 0, cut, False)
        self.frozen_values = part(prefix.values, 0, cut, False)
        self.trainable_keys = part(prefix.keys, cut, None, True)
        self.trainable_values = part(prefix.values, cut, None, True)

    @classmethod
    def from_prefix(cls, prefix: Prefix, num_frozen_tokens: int = 1) -> TrainableCache:
        return cls(prefix, num_frozen_tokens)

    @classmethod
    def from_snapshot(cls, snapshot: Snapshot) -> TrainableCache:
        """From what a file holds, in float32."""
        return cls(Prefix(*snapshot.layers()), snapshot.num_frozen_tokens)

    @classmethod
    def from_random(
        cls,
        config: Any,
        num_tokens: int,
        num_frozen_tokens: int = 1,
        seed: int = 0,
        std: float = 0.02,
    ) -> TrainableCache:
        """From normal noise of the given spread; the weak baseline of the paper (its table 2).

        Args:
            config: the model's transformers config.
        """
        kv = KvShape.of(config)
        generator = torch.Generator().manual_seed(seed)

        def noise() -> list[Tensor]:
            return [
                torch.randn((1, heads, num_tokens, size), generator=generator) * std
                for heads, size in kv.layers
            ]

        return cls(Prefix(noise(), noise()), num_frozen_tokens)

    @property
    def num_frozen_tokens(self) -> int:
        """How many of the first tokens are never trained."""
        return int(self.frozen_keys[0].shape[2])

    @property
    def num_tokens(self) -> int:
        """P, frozen tokens included."""
        return self.num_frozen_tokens + int(self.trainable_keys[0].shape[2])

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.frozen_keys)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimizer gets: 2L tensors."""
        return [*self.trainable_keys, *self.trainable_values]

    def prefix(self, dtype: torch.dtype | None = None) -> Prefix:
        """The whole cartridge as a prefix, frozen tokens first; gradients flow back through it."""

        def join(frozen: nn.ParameterList, trained: nn.ParameterList) -> list[Tensor]:
            return [
                torch.cat([a, b], dim=2).to(dtype=dtype)
                for a, b in zip(frozen, trained, strict=True)
            ]

        return Prefix(
            join(self.frozen_keys, self.trainable_keys),
            join(self.frozen_values, self.trainable_values),
        )

    def as_cache(self, dtype: torch.dtype | None = None) -> DynamicCache:
        """A growing transformers ``Cache`` that begins with the cartridge.

        For ``model(..., past_key_values=cartridge.as_cache())`` and ``model.generate`` on a model
        with one of transformers' own attention implementations. Positions go on after the
        cartridge by themselves. ``generate`` wants the prompt's ids and an
        ``attention_mask`` ``[1, P + prompt]`` of ones.
        """
        return self.prefix(dtype).as_cache()

    def extra_repr(self) -> str:
        return (
            f"tokens={self.num_tokens}, frozen={self.num_frozen_tokens}, layers={self.num_layers}"
        )
