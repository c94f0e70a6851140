"""Loading the frozen base model that student and teacher share.

No model file is forked: a decoder that takes its attention from transformers' attention interface
will do, if that attention is what the packed one computes. Both are compared here, on the model
itself (:mod:`cartridge_distill.model.own_attention`); what differs is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from cartridge_distill.cartridge.kv_shape import KvShape, text_config
from cartridge_distill.model.attention import ATTENTION_NAME, register
from cartridge_distill.model.frozen_linear import onednn_is_faster, use_frozen_linear
from cartridge_distill.model.fused_layers import use_fused_layers
from cartridge_distill.model.own_attention import check_own_attention
from cartridge_distill.model.reading import read_model_config, reading
from cartridge_distill.util.errors import ConfigError


def check_supported(config: PreTrainedConfig) -> None:
    """Refuses architectures on which a packed forward with a prefix would be wrong.

    Raises:
        ConfigError: the architecture keeps state other than keys and values of one size in each
            layer, or scales its positions by the longest one of a forward.
    """
    text = text_config(config)
    kinds = set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ConfigError(
            f"{text.model_type}: layers of kind {sorted(kinds)} keep more than keys and values; "
            "fix: use a model with full or sliding-window attention only"
        )
    KvShape.of(config)
    if moving := sorted(_rope_types(getattr(text, "rope_parameters", None)) & _BY_LONGEST):
        raise ConfigError(
            f"{text.model_type}: rope_type={moving} scales positions by the longest one of a "
            "forward, so that packed sequences would change each other; fix: use a model without it"
        )


_BY_LONGEST = {"dynamic", "longrope"}


def _rope_types(parameters: Any) -> set[str]:
    """Of all layers; transformers keeps one set of parameters, or one a kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    found = {str(parameters["rope_type"])} if "rope_type" in parameters else set()
    return found.union(*(_rope_types(inner) for inner in parameters.values()))


def prepare_model(model: PreTrainedModel) -> PreTrainedModel:
    """Freezes a model in place and sets the packed attention.

    Raises:
        ConfigError: the model class cannot take a custom attention function, or computes something
            else with it than with its own, see :mod:`cartridge_distill.model.own_attention`.
    """
    check_supported(model.config)
    register()
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigError(
            f"{type(model).__name__} does not take its attention from transformers' attention "
            "interface; without it a cartridge cannot be attached; fix: use another model"
        )
    model.set_attn_implementation(ATTENTION_NAME)
    model.requires_grad_(False)
    model.eval()
    check_own_attention(model)
    if onednn_is_faster():
        use_frozen_linear(model)
    use_fused_layers(model)
    return model


def load_model(
    name_or_path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Loads a decoder from a folder or a hub id: frozen, eval mode, ready for packed forwards.

    Raises:
        ConfigError: it cannot be read, or not be used with a cartridge.
    """
    config = read_model_config(name_or_path)
    check_supported(config)
    with no_weights_bar(), reading(name_or_path, "weights"):
        model = AutoModelForCausalLM.from_pretrained(
            str(Path(name_or_path).expanduser()), dtype=dtype
        )
    return prepare_model(model.to(device))


@contextmanager
def no_weights_bar() -> Iterator[None]:
    """Without transformers' bar over the tensors, which says not of what; downloads keep theirs."""
    shown, downloads_shown = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()  # of both
    if downloads_shown:
        enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if not downloads_shown:
            disable_progress_bars()
