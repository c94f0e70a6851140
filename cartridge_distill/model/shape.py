"""The numbers of a model that its memory depends on, from its config alone: no weights are read.

The model is built on torch's ``meta`` device, where a tensor is a shape, and looked at: its
parameters are counted, not computed by a formula of ours, and a layer tells by its own modules how
many norms it has and how wide its MLP is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from cartridge_distill.cartridge.kv_shape import KvShape, text_config
from cartridge_distill.util.errors import ConfigError


@dataclass(frozen=True)
class DecoderShape:
    """What a decoder's memory depends on.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, vocabulary: L, the width, Hq, H, D and V.
        parameters: numbers in the whole model; tied embeddings once.
        layer_parameters: numbers in its largest decoder layer.
        mlp: numbers a token that the widest part of a layer puts out at once: gate and up together
            where the MLP is gated.
        gated: whether it is.
        norms: norms over the width in a layer (Llama 2, Gemma 2 and 3 4).
        head_norms: whether queries and keys are normalised (Qwen 3, Gemma 3).
        capped_logits: whether the logits have a soft cap (Gemma 2).
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    parameters: int
    layer_parameters: int
    mlp: int
    gated: bool
    norms: int
    head_norms: bool
    capped_logits: bool

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """Of a transformers config.

        Raises:
            ConfigError: a layer is built in a way whose memory is not known here (a mixture of
                experts, for one).
        """
        text = text_config(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        kv, decoder_layers = KvShape.of(config), text.num_hidden_layers
        if not (isinstance(kv.kv_heads, int) and isinstance(kv.head_dim, int)):
            raise _unknown(text, "its layers differ in kv heads or head size")
        if kv.num_layers != decoder_layers:
            raise _unknown(text, "some of its layers read the keys and values of others")
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if len(layers) != kv.num_layers:
            raise _unknown(text, f"{len(layers)} decoder layers found of {kv.num_layers}")
        layer = max(layers, key=_size)
        linear = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        attention = _attention_of(layer)
        inside = set(attention.modules()) if attention is not None else set()
        mlp_layers = [m for m in linear if m not in inside]
        ends = [m for m in mlp_layers if m.out_features == text.hidden_size]
        # An MLP as wide as the model has several that could be its last; then any is as good.
        square = len({_features(m) for m in mlp_layers}) == 1
        back = ends[-1:] if square else ends
        wide = [m for m in mlp_layers if m not in back and m.in_features == text.hidden_size]
        if attention is None or len(back) != 1 or not 1 <= len(wide) <= 2:
            raise _unknown(text, f"its MLP has linear layers {[_features(m) for m in linear]}")
        mlp = sum(m.out_features for m in wide)
        norms = [m for m in layer.modules() if type(m).__name__.endswith("Norm")]
        return cls(
            layers=kv.num_layers,
            hidden=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=kv.kv_heads,
            head_dim=kv.head_dim,
            vocabulary=text.vocab_size,
            parameters=_size(model),
            layer_parameters=_size(layer),
            mlp=mlp,
            gated=mlp == 2 * back[0].in_features,
            norms=sum(m not in inside for m in norms),
            head_norms=any(m in inside for m in norms),
            capped_logits=getattr(text, "final_logit_softcapping", None) is not None,
        )

    @property
    def kv_numbers(self) -> int:
        """Numbers that one token's keys and values take, all layers together."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _features(linear: nn.Linear) -> tuple[int, int]:
    return linear.in_features, linear.out_features


def _attention_of(layer: nn.Module) -> nn.Module | None:
    return next((m for m in layer.modules() if hasattr(m, "layer_idx") and m is not layer), None)


def _unknown(text: Any, why: str) -> ConfigError:
    return ConfigError(f"the memory of a {text.model_type} model cannot be predicted: {why}")
