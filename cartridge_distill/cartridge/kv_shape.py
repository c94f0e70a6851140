"""The numbers that a model and a KV prefix for it must agree on.

Nothing here needs torch or a model's code: files are checked against a model's config alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cartridge_distill.util.errors import CartridgeFormatError

PAGE_TOKENS = 16
"""Page size of the real server: a cartridge's token count must be a multiple of it."""


def text_config(config: Any) -> Any:
    """The decoder's own part of a transformers config, also of multimodal models."""
    return config.get_text_config(decoder=True)


@dataclass(frozen=True)
class KvShape:
    """What one token's keys and values take: L layers, H kv heads of D numbers."""

    num_layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> KvShape:
        """Of a model, by its transformers config; of the decoder, where there is more."""
        text = text_config(config)
        heads = text.num_attention_heads
        return cls(
            num_layers=text.num_hidden_layers,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        )


def check_fits(prefix: KvShape, config: Any) -> None:
    """Compares a prefix with a model.

    Args:
        config: the model's transformers config.

    Raises:
        CartridgeFormatError: naming the number that differs.
    """
    model = KvShape.of(config)
    for what, got, want in (
        ("layers", prefix.num_layers, model.num_layers),
        ("kv heads", prefix.kv_heads, model.kv_heads),
        ("head size", prefix.head_dim, model.head_dim),
    ):
        if got != want:
            kind = text_config(config).model_type
            raise CartridgeFormatError(
                f"the prefix has {got} {what}, the model ({kind}) has {want}; "
                "it was made for another model"
            )
