"""The ways to a student's forward and backward that `packing.py` compares and times.

Ours, by each attention backend; transformers' own SDPA attention with the cartridge in its cache,
one sequence at a time and padded; and PEFT's CARTRIDGE where peft is installed. The baselines by
SDPA get the best treatment: padding is not sent through the vocabulary projection. PEFT's forward
is called as its users call it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cartridge_distill.cartridge.formats.peft import prompt_embeddings
from cartridge_distill.cartridge.kv_shape import text_config
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.model.attention import ATTENTION_NAME
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.frozen_linear import (
    onednn_is_faster,
    use_frozen_linear,
    use_torch_linear,
)
from cartridge_distill.model.logprobs import chosen_logprobs
from cartridge_distill.model.packing import pack
from cartridge_distill.util.processes import say

_MOST_WEIGHTS = 1_000_000_000  # attention weights of all layers, kept for the backward

Forward = Callable[[PreTrainedModel, Prefix, Sequence[Tensor]], Tensor]
"""(model, prefix, sequences) -> log-probs of all tokens but each sequence's first, in order."""

Step = Callable[[Sequence[Tensor]], tuple[Tensor, list[Tensor]]]
"""sequences -> those log-probs ``[N]``, and the gradients of the cartridge's 2L tensors."""


def packed(backend: str) -> Forward:
    """The project's own forward, by one of its attention backends."""

    def forward(model: PreTrainedModel, prefix: Prefix, sequences: Sequence[Tensor]) -> Tensor:
        batch = pack(sequences)
        response_mask = batch.index > 0
        logits = packed_forward(model, prefix, batch, batch.predicts(response_mask), backend)
        return chosen_logprobs(logits, batch.tokens(response_mask))

    return forward


def _cache(model: PreTrainedModel, prefix: Prefix, rows: int) -> DynamicCache:
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        wide = [tensor.to(model.dtype).expand(rows, -1, -1, -1) for tensor in (key, value)]
        cache.update(wide[0], wide[1], layer)
    return cache


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """``[N, hidden]`` -> ``[N, V]``, as the model's own class does it."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _pad(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids ``[B, longest]``, padded on the right, and which of them are real."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).to(ids.device)


def padded(model: PreTrainedModel, prefix: Prefix, sequences: Sequence[Tensor]) -> Tensor:
    """``[B, longest]``, the cartridge repeated in every row."""
    ids, real = _pad(sequences)
    rows, longest = ids.shape
    positions = prefix.num_tokens + torch.arange(longest, device=ids.device)
    hidden = model.get_decoder()(
        input_ids=ids,
        attention_mask=torch.cat([real.new_ones(rows, prefix.num_tokens), real], 1).long(),
        position_ids=positions.expand(rows, -1),
        past_key_values=_cache(model, prefix, rows),
        use_cache=True,
    ).last_hidden_state
    response_mask = real[:, 1:]
    return chosen_logprobs(_logits(model, hidden[:, :-1][response_mask]), ids[:, 1:][response_mask])


class PeftCartridge:
    """PEFT's own CARTRIDGE adapter around the same base, with the cartridge's numbers."""

    def __init__(self, model: PreTrainedModel, cartridge: TrainableCache) -> None:
        from peft import CartridgeConfig, get_peft_model

        config = CartridgeConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=cartridge.num_tokens,
            num_frozen_tokens=cartridge.num_frozen_tokens,
        )
        self._cartridge = cartridge
        self._peft: Any = get_peft_model(model, config)
        encoder: Any = self._peft.prompt_encoder["default"]
        table = prompt_embeddings(Snapshot.take(cartridge.state_dict(), torch.float32))
        encoder.load_prompt_embeddings(table)
        self._encoder: Any = encoder

    def step(self, sequences: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """A :data:`Step`, the gradients in the order of the cartridge's own tensors."""
        ids, real = _pad(sequences)
        self._encoder.trainable_embedding.grad = None
        logits = self._peft(input_ids=ids, attention_mask=real.long()).logits
        response_mask = real[:, 1:]
        logprobs = chosen_logprobs(logits[:, :-1][response_mask], ids[:, 1:][response_mask])
        (-logprobs.sum()).backward()
        grad_PE: Tensor = self._encoder.trainable_embedding.grad
        _, heads, tokens, size = self._cartridge.trainable_keys[0].shape
        # A row is [layer][key, value][head][D].
        parts = grad_PE.view(tokens, -1, heads, size).permute(1, 2, 0, 3)[:, None]
        return logprobs.detach(), [*parts[0::2], *parts[1::2]]


@dataclass(frozen=True)
class Way:
    name: str
    forward: Forward
    attention: str = ATTENTION_NAME
    alone: bool = False  # sequence after sequence, each with its own forward and backward
    torch_linear: bool = False  # linear layers as torch computes them, where oneDNN is faster
    peft: bool = False  # PEFT's adapter in the cartridge's place; `forward` is not used


def ways_for(model: PreTrainedModel, prefix: int, lengths: Sequence[int]) -> list[Way]:
    """The first is the project's choice on this device; backends whose kept attention weights
    would not fit are left out, and that is said."""
    config = text_config(model.config)
    kept = config.num_hidden_layers * config.num_attention_heads
    weights = {
        "flex": 0,  # recomputes them
        "grouped": kept * sum(n * (prefix + n) for n in lengths),
        "dense": kept * sum(lengths) * (prefix + sum(lengths)),
    }
    on_gpu = model.device.type == "cuda"
    names = ["flex", "grouped", "dense"] if on_gpu else ["grouped", "dense"]
    ours: list[Way] = []  # flex has no backward on a CPU
    for name in names:
        if ours and weights[name] > _MOST_WEIGHTS:
            gib = weights[name] * 4 / 1024**3
            say(f"   left out: packed, {name} (would keep {gib:.0f} GiB of attention weights)")
        else:
            ours.append(Way(f"packed, {name}", packed(name)))
    if not on_gpu and onednn_is_faster():
        ours.append(Way("packed, MKL linear", packed("grouped"), torch_linear=True))
    theirs = [Way("PEFT CARTRIDGE, padded", padded, "sdpa", peft=True)]
    return [
        *ours,
        *(theirs if importlib.util.find_spec("peft") else []),
        Way("one by one, SDPA", padded, "sdpa", alone=True),
        Way("padded batch, SDPA", padded, "sdpa"),
    ]


def stepper(way: Way, model: PreTrainedModel, cartridge: TrainableCache) -> Step:
    """The way's forward and backward, as a function of the sequences.

    The ways share one model, so each call sets what it needs of it. PEFT notes the model's dtype
    here: after another ``model.to()`` make another one.
    """
    theirs = PeftCartridge(model, cartridge) if way.peft else None

    def step(sequences: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        model.set_attn_implementation(way.attention)
        if onednn_is_faster():
            (use_torch_linear if way.torch_linear else use_frozen_linear)(model)
        if theirs is not None:
            return theirs.step(sequences)
        parameters = cartridge.trainable_parameters()
        for parameter in parameters:
            parameter.grad = None
        found = []
        for part in [[one] for one in sequences] if way.alone else [list(sequences)]:
            logprobs = way.forward(model, cartridge.prefix(), part)
            (-logprobs.sum()).backward()
            found.append(logprobs.detach())
        return torch.cat(found), [p.grad for p in parameters if p.grad is not None]

    return step
