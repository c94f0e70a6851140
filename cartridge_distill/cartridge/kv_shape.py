"""The numbers that a model and a KV prefix for it must agree on.

Nothing here needs torch or a model's code: files are checked against a model's config alone.

A prefix has keys and values of the layers that make their own. Layers may differ in heads and head
size (Gemma 4: full and sliding layers). Layers at the end may read the KV of an earlier layer
(Gemma 3n, Gemma 4): they have none of their own, and read the prefix of that layer, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cartridge_distill.util.errors import CartridgeFormatError, ConfigError

PAGE_TOKENS = 16
"""Page size of the real server: a cartridge's token count must be a multiple of it."""

PerLayer = int | tuple[int, ...]
"""A number that all layers have, or one for each layer."""


def text_config(config: Any) -> Any:
    """The decoder's own part of a transformers config, also of multimodal models."""
    return config.get_text_config(decoder=True)


def per_layer(numbers: list[int] | tuple[int, ...]) -> PerLayer:
    """One number where all layers agree."""
    return numbers[0] if len(set(numbers)) == 1 else tuple(numbers)


@dataclass(frozen=True)
class KvShape:
    """What one token's keys and values take: L layers, H kv heads of D numbers.

    Attributes:
        num_layers: layers that have keys and values of their own.
        kv_heads, head_dim: H and D; a tuple of L where layers differ.

    Raises:
        CartridgeFormatError: a tuple has another length than L.
    """

    num_layers: int
    kv_heads: PerLayer
    head_dim: PerLayer

    def __post_init__(self) -> None:
        for name in ("kv_heads", "head_dim"):
            numbers = getattr(self, name)
            if isinstance(numbers, tuple):
                if len(numbers) != self.num_layers:
                    raise CartridgeFormatError(
                        f"{name} has {len(numbers)} numbers for {self.num_layers} layers"
                    )
                object.__setattr__(self, name, per_layer(numbers))

    @classmethod
    def of(cls, config: Any) -> KvShape:
        """Of a model, by its transformers config; of the decoder, where there is more.

        Raises:
            ConfigError: the keys and values of a layer differ in size, or it has none.
        """
        text = text_config(config)
        for name in ("num_hidden_layers", "num_attention_heads"):
            if not isinstance(getattr(text, name, None), int):
                raise ConfigError(
                    f"{text.model_type}: {name}={getattr(text, name, None)}; a cartridge needs "
                    "keys and values in every layer; fix: use a decoder that has them"
                )
        if getattr(text, "kv_lora_rank", None):
            raise ConfigError(
                f"{text.model_type}: kv_lora_rank={text.kv_lora_rank}, so that keys and values of "
                "a layer differ in size; a cartridge needs both of one size; fix: use a model "
                "without latent attention"
            )
        own = len(kv_sources(config)) - (getattr(text, "num_kv_shared_layers", 0) or 0)
        shapes = [_layer_shape(text, layer) for layer in range(own)]
        return cls(
            num_layers=own,
            kv_heads=tuple(heads for heads, _ in shapes),
            head_dim=tuple(size for _, size in shapes),
        )

    def layer(self, layer: int) -> tuple[int, int]:
        """Heads and head size of one layer."""
        heads, size = self.kv_heads, self.head_dim
        return (
            heads if isinstance(heads, int) else heads[layer],
            size if isinstance(size, int) else size[layer],
        )

    @property
    def layers(self) -> list[tuple[int, int]]:
        """Heads and head size of each layer."""
        return [self.layer(layer) for layer in range(self.num_layers)]

    @property
    def numbers(self) -> int:
        """Numbers that one token's keys and values take, all layers together."""
        if isinstance(self.kv_heads, int) and isinstance(self.head_dim, int):
            return 2 * self.num_layers * self.kv_heads * self.head_dim
        return 2 * sum(heads * size for heads, size in self.layers)


def _layer_shape(text: Any, layer: int) -> tuple[int, int]:
    """Heads and head size of a layer that has its own KV, as transformers' models read them."""
    # From transformers 5.15 on each layer has a config of its own where layers differ.
    own = getattr(text, "per_layer_config", None)
    of_layer = text if own is None else own[layer]
    heads = getattr(of_layer, "num_key_value_heads", None) or of_layer.num_attention_heads
    size = getattr(of_layer, "head_dim", None)
    size = size or of_layer.hidden_size // of_layer.num_attention_heads
    kinds = getattr(text, "layer_types", None)
    if own is None and kinds and kinds[layer] == "full_attention":
        size = getattr(text, "global_head_dim", None) or size
        if getattr(text, "attention_k_eq_v", False):
            heads = getattr(text, "num_global_key_value_heads", None) or heads
    return int(heads), int(size)


def kv_sources(config: Any) -> tuple[int, ...]:
    """For each decoder layer the layer whose keys and values it reads: mostly itself.

    The last ``num_kv_shared_layers`` read those of the last layer of their kind before them.

    Raises:
        ConfigError: there is no such layer.
    """
    text = text_config(config)
    count = text.num_hidden_layers
    own = count - (getattr(text, "num_kv_shared_layers", 0) or 0)
    if own == count:
        return tuple(range(count))
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * count
    last = {kind: layer for layer, kind in enumerate(kinds[:own])}
    if missing := sorted({kind for kind in kinds[own:count]} - last.keys()):
        raise ConfigError(
            f"{text.model_type}: num_kv_shared_layers={count - own} of {count} layers, and none of "
            f"the others is a {missing[0]} layer whose keys and values could be read; "
            "fix: use another model"
        )
    return tuple(range(own)) + tuple(last[kind] for kind in kinds[own:count])


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
                "it was made for another model; fix: give the model that it was made for"
            )


def described(numbers: PerLayer) -> int | list[int]:
    """As JSON holds it."""
    return numbers if isinstance(numbers, int) else list(numbers)
