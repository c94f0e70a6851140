"""Tiny models, a tokenizer without files, and the plain one-by-one forward that everything is
measured against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from cartridge_distill.cartridge.checkpoint import write_tokasaurus
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.cartridge.trainable import TrainableCache

VOCAB = 259
ARCHITECTURES = [
    *("llama", "qwen2", "qwen3", "mistral", "mistral_window"),
    *("gemma", "gemma2", "gemma3"),
]

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if not loop.last or m['role'] != 'assistant' %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_model(kind: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Two layers, grouped queries, random weights, plain eager attention, float32.

    Args:
        changes: to the configuration.
    """
    name = {"mistral_window": "mistral", "gemma3": "gemma3_text"}.get(kind, kind)
    extra: dict[str, Any] = {}
    if kind == "mistral":
        extra["sliding_window"] = None
    if kind == "mistral_window":
        extra["sliding_window"] = 24
    if kind in ("gemma2", "gemma3"):
        extra |= {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
        extra["query_pre_attn_scalar"] = 16
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    config = AutoConfig.for_model(name, **{**settings, **extra, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual initialisation: distributions far from uniform, and attention
            # that prefers some keys, so that a wrong mask shows.
            parameter.add_(torch.randn_like(parameter) * 0.08)
    model.eval()
    return model


def endless_model(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny Llama that knows bytes alone, no end token: answers are as long as they may be."""
    none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    settings = {"vocab_size": 256, "max_position_embeddings": 16_384, **none, **changes}
    return tiny_model(seed=seed, **settings)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, three special ones; adds nothing by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: number for number, char in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """As transformers saves it, with :func:`byte_tokenizer`."""
    disable_progress_bar()  # it would be the first line of every report
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def random_cartridge(model: PreTrainedModel, tokens: int = 16, seed: int = 0) -> TrainableCache:
    """Keys and values of ordinary size, one frozen token."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)

    def layers() -> list[Tensor]:
        shape = (1, config.num_key_value_heads, tokens, config.head_dim)
        return [torch.randn(shape, generator=generator) for _ in range(config.num_hidden_layers)]

    return TrainableCache(Prefix(layers(), layers()), num_frozen_tokens=1)


def write_cartridge(cartridge: TrainableCache, directory: Path, cartridge_id: str) -> None:
    write_tokasaurus(cartridge, directory / cartridge_id, "tiny", dtype=torch.float32)


@torch.no_grad()
def plain_distributions(
    model: PreTrainedModel,
    prefix: Prefix | None,
    prompt_ids: list[int],
    new_ids: list[int],
    temperature: float = 1.0,
) -> Tensor:
    """Log-probs ``[n, V]`` of what follows the prompt and each of the n new tokens but the last.

    One ordinary forward over one sequence, with the prefix in a transformers cache.
    """
    cache = DynamicCache()
    start = 0
    if prefix is not None:
        start = prefix.num_tokens
        for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            cache.update(key.detach(), value.detach(), layer)
    ids = torch.tensor([prompt_ids + new_ids])
    positions = torch.arange(start, start + ids.shape[1])[None]
    logits = model(input_ids=ids, position_ids=positions, past_key_values=cache).logits[0]
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    return logprobs[len(prompt_ids) - 1 : -1]


def plain_logprobs(
    model: PreTrainedModel,
    prefix: Prefix | None,
    prompt_ids: list[int],
    new_ids: list[int],
    temperature: float = 1.0,
) -> list[float]:
    """Log-probs of ``new_ids``, as :func:`plain_distributions`."""
    logprobs = plain_distributions(model, prefix, prompt_ids, new_ids, temperature)
    return [float(logprobs[place, token]) for place, token in enumerate(new_ids)]
