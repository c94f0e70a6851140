"""A conversation with a model that has a cartridge instead of the document.

The cartridge is the beginning of the model's KV cache: the ids of `render_prompt` follow it, at the
positions after its own.

Not done here: serving (`cartridge_distill.server`), or keeping the KV of earlier turns; each turn
of a conversation is short and computed anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TextStreamer

from cartridge_distill.cartridge.checkpoint import load_cartridge
from cartridge_distill.cartridge.kv_shape import check_fits
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.model.prompts import (
    Message,
    render_alone,
    render_document,
    render_prompt,
)
from cartridge_distill.model.reading import read_tokenizer, reading
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.extras import require


@torch.no_grad()
def reply(
    model: Any,
    tokenizer: Any,
    cartridge: TrainableCache | None,
    messages: Sequence[Message],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    streamer: Any = None,
) -> list[int]:
    """The ids the model answers with, the end token included.

    Args:
        model: an ordinary transformers model (its own attention, not the packed one).
        cartridge: what stands in for the document, on any device; None for the bare model, which
            begins as it always does (:func:`cartridge_distill.model.prompts.begin_of_text`).
        messages: the conversation; a last assistant message is a started answer.
        temperature: 0 takes the most likely token.
        streamer: gets the ids as they come.
    """
    length = 0
    cache = None
    if cartridge is None:
        prompt = render_alone(tokenizer, messages)
    else:
        prompt = render_prompt(tokenizer, messages)
        check_fits(cartridge.prefix().kv_shape, model.config)
        length = cartridge.num_tokens
        cache = cartridge.to(model.device).as_cache(model.dtype)
    # generate() takes the ids of the whole context and skips those whose KV the cache holds: the
    # cartridge's places need ids, but these are never looked up.
    filler = tokenizer.eos_token_id or 0
    ids = torch.tensor([[filler] * length + prompt], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        pad_token_id=filler,
        streamer=streamer,
        **(sampling or {"do_sample": False}),
    )
    new: list[int] = output[0, ids.shape[1] :].tolist()
    return new


def converse(options: argparse.Namespace) -> None:
    """What ``python -m cartridge_distill.cli.chat`` does, with its parsed options.

    Raises:
        ConfigError: options that make no sense together.
        CartridgeFormatError: the cartridge cannot be read, or is of another model.
    """
    if options.start is not None and options.prompt is None:
        raise ConfigError("--start begins the answer to --prompt; give both, or neither.")
    if options.temperature < 0 or options.max_new_tokens < 1:
        raise ConfigError("--temperature must be 0 or more, --max-new-tokens 1 or more.")
    cartridge = load_cartridge(options.cartridge) if options.cartridge else None
    tokenizer = read_tokenizer(options.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with reading(options.model, "weights"):
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    model.to(device).eval()
    if cartridge is not None:
        print(_memory(cartridge, tokenizer, options.document), file=sys.stderr)
    messages: list[dict[str, str]] = []
    while True:
        messages.append({"role": "user", "content": options.prompt or input("> ")})
        started = [{"role": "assistant", "content": options.start}] if options.start else []
        if options.start:
            print(options.start, end="", flush=True)
        new = reply(
            model,
            tokenizer,
            cartridge,
            [*messages, *started],
            options.max_new_tokens,
            options.temperature,
            TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        if options.prompt is not None:
            return
        answer = tokenizer.decode(new, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})


def _memory(cartridge: TrainableCache, tokenizer: Any, document: Path | None) -> str:
    """What the cartridge takes, and what the document would have taken in its place."""
    said = f"[the cartridge takes {cartridge.num_tokens} KV tokens"
    if document is None:
        return said + "]"
    require("chat --document")
    from cartridge_distill.data.documents.one import one_document  # an extra reads documents

    tokens = len(render_document(tokenizer, one_document(document).text))
    return f"{said}; the document would have taken {tokens}, {tokens / cartridge.num_tokens:.1f}x]"
