"""A GGUF file to an ordinary Hugging Face folder in bfloat16: Llama and Gemma 3.

The tokenizer is loaded from the new folder and held against the one that was saved before anybody
trains with it (`gguf_tokenizer`).

Not done here: getting the file (`demo_model`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from cartridge_distill.model.decode_gguf import (
    decode_gemma3,
    decode_llama,
    field,
    file_name,
    opened,
)
from cartridge_distill.model.gguf_tokenizer import check_survives, sentencepiece_tokenizer
from cartridge_distill.util.errors import ConfigError


def convert_gguf(
    gguf: Path,
    folder: Path,
    end_token: str | None = None,
    tokenizer_from: Path | None = None,
) -> None:
    """Writes config, weights and tokenizer.

    Args:
        end_token: ends an answer and pads, where the file says something else, or nothing.
        tokenizer_from: a folder with the model's own tokenizer, in place of the file's.

    Raises:
        ConfigError: an architecture that is not known, weights that are not the config's, or a
            tokenizer that does not survive saving.
    """
    reader = opened(gguf)
    architecture = field(reader, "general.architecture")
    if architecture not in ("llama", "gemma3"):
        raise ConfigError(
            f"{gguf.name} holds a model of the architecture {architecture!r}; known are 'llama' "
            "and 'gemma3'; fix: take the model's folder from the Hub"
        )
    tokenizer = _tokenizer(gguf, reader, tokenizer_from)
    if end_token is not None:
        tokenizer.eos_token = end_token
        tokenizer.pad_token = end_token
    if architecture == "llama":
        config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        weights = decode_llama(reader, config.num_attention_heads, config.num_key_value_heads)
    else:
        config, weights = _gemma3_config(reader), decode_gemma3(reader)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    left = model.load_state_dict(weights, strict=False)
    # The output layer may be the embedding's weights, and stands in neither file.
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if left.unexpected_keys or set(left.missing_keys) - tied:
        raise ConfigError(
            f"{gguf.name} does not hold the weights of its own config: {left}; fix: take another "
            "file"
        )
    for settings in (model.config, model.generation_config):
        if end_token is None:
            settings.bos_token_id = tokenizer.bos_token_id
        settings.eos_token_id = tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    check_survives(tokenizer, folder)


def _gemma3_config(reader: GGUFReader) -> PreTrainedConfig:
    """What the file says, and what all Gemma 3 models have in common.

    The scale of attention is not in the file. It is the size of a head in all of them but the
    largest, which is refused.
    """

    def of(key: str) -> Any:
        return field(reader, f"gemma3.{key}")

    head, layers = of("attention.key_length"), of("block_count")
    if layers > 60:
        raise ConfigError(
            f"{file_name(reader)} has {layers} layers: Gemma 3 27B scales its attention otherwise "
            "than the smaller ones; fix: take the model's folder from the Hub."
        )
    return Gemma3TextConfig(
        vocab_size=len(field(reader, "tokenizer.ggml.tokens")),
        hidden_size=of("embedding_length"),
        intermediate_size=of("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=of("attention.head_count"),
        num_key_value_heads=of("attention.head_count_kv"),
        head_dim=head,
        query_pre_attn_scalar=head,
        max_position_embeddings=of("context_length"),
        rms_norm_eps=of("attention.layer_norm_rms_epsilon"),
        sliding_window=of("attention.sliding_window"),
        layer_types=[
            "full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(layers)
        ],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": of("rope.freq_base")},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        tie_word_embeddings=True,
    )


def _tokenizer(gguf: Path, reader: GGUFReader, folder: Path | None) -> PreTrainedTokenizerBase:
    if folder is not None:
        return AutoTokenizer.from_pretrained(folder)
    if field(reader, "tokenizer.ggml.model") == "llama":
        return sentencepiece_tokenizer(reader)
    tokenizer = AutoTokenizer.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, clean_up_tokenization_spaces=False
    )
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer
