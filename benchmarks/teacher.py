"""Two tables of `packing.py` about the teacher: reading a document, and prompts that come again.

Reading: the document's keys and values by this project (the fused kernel), by its plain products,
and by transformers' own SDPA attention, all with the same linear layers. Prompts: answers behind
prompts whose keys and values are kept, and behind prompts that are computed again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.bases import vocabulary_of
from benchmarks.measure import Job, Measured, check, measure, print_rows
from cartridge_distill.cartridge.kv_shape import KvShape
from cartridge_distill.model.attention import ATTENTION_NAME
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.kept_tokens import KeptTokens
from cartridge_distill.model.logprobs import chosen_logprobs
from cartridge_distill.model.packing import PackedBatch, pack
from cartridge_distill.model.prefill import prefix_from_tokens
from cartridge_distill.util.processes import say

Note = Callable[[str, list[Measured]], None]


def _random_ids(model: PreTrainedModel, count: int, seed: int, device: torch.device) -> Tensor:
    draw, vocabulary = random.Random(seed), vocabulary_of(model)
    return torch.tensor([draw.randrange(vocabulary) for _ in range(count)], device=device)


def _read(model: PreTrainedModel, document: Tensor) -> Tensor:
    """Keys and values of all layers, as this project computes them."""
    model.set_attn_implementation(ATTENTION_NAME)
    prefix = prefix_from_tokens(model, document)
    return torch.stack([*prefix.keys, *prefix.values])


def _read_plainly(model: PreTrainedModel, document: Tensor) -> Tensor:
    with patch("cartridge_distill.model.attention.is_fusable", lambda *_: False):
        return _read(model, document)


def _read_by_sdpa(model: PreTrainedModel, document: Tensor) -> Tensor:
    model.set_attn_implementation("sdpa")
    cache = DynamicCache()
    model(input_ids=document[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
    return torch.stack([*layers[0], *layers[1]])


@torch.no_grad()
def reading_tables(model: PreTrainedModel, options: argparse.Namespace, note: Note) -> None:
    """One table for each length of ``--read``."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    ways = {
        "read by this project": _read,
        "transformers' SDPA attention": _read_by_sdpa,
    }
    if options.device == "cpu":
        ways["plain products"] = _read_plainly
    for length in options.read:
        document = _random_ids(model, length, 2, device)
        say(f"\n== reading {length} tokens: every way once, then {options.repeats} times")
        model.float()
        few = document[:512]
        found = [(way(model, few), list[Tensor]()) for way in ways.values()]
        largest = found[-1][0].abs().max()
        check(
            "keys and values of the largest",
            list(ways),
            [(values / largest, none) for values, none in found],
            options.tolerance,
        )
        model.to(dtype)
        jobs = [Job(name, partial(way, model, document), length) for name, way in ways.items()]
        rows = measure(jobs, options.repeats, device, options.clock)
        note(f"reading {length}", rows)
        print_rows(f"(e) reading a document of {length} tokens", rows)
    model.set_attn_implementation(ATTENTION_NAME)


@torch.no_grad()
def prompts_table(model: PreTrainedModel, options: argparse.Namespace, note: Note) -> None:
    """Answers behind prompts that come again, and whose answers differ each time."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    model.set_attn_implementation(ATTENTION_NAME)
    model.to(dtype)
    prefix = prefix_from_tokens(model, _random_ids(model, options.document, 1, device))
    prompts = [_random_ids(model, options.length, 10 + n, device) for n in range(options.sequences)]
    size = KvShape.of(model.config).numbers * dtype.itemsize
    store = KeptTokens(KvShape.of(model.config), dtype, size * options.length * options.sequences)
    draw = random.Random(0)

    def batch_of() -> tuple[PackedBatch, Tensor]:
        seeds = [draw.randrange(10**9) for _ in prompts]
        answers = [_random_ids(model, options.answer, seed, device) for seed in seeds]
        batch = pack([torch.cat(pair) for pair in zip(prompts, answers, strict=True)])
        return batch, torch.from_numpy(batch.index >= options.length)

    def score(keeping: bool, given: tuple[PackedBatch, Tensor] | None = None) -> Tensor:
        batch, mask = given or batch_of()
        rows = batch.predicts(mask)
        kept = store.behind("document") if keeping else None
        logits = packed_forward(model, prefix, batch, rows, "grouped", kept)
        return chosen_logprobs(logits, batch.tokens(mask))

    say(f"\n== prompts that come again: every way once, then {options.repeats} times")
    names = ["prompts' KV kept", "prompts computed again"]
    score(True)
    given = batch_of()
    if dtype == torch.float32:
        check(
            "prompts",
            names,
            [(score(True, given), []), (score(False, given), [])],
            options.tolerance,
        )
    tokens = options.sequences * options.answer
    jobs = [
        Job(names[0], partial(score, True), tokens),
        Job(names[1], partial(score, False), tokens),
    ]
    rows = measure(jobs, options.repeats, device, options.clock)
    note("prompts", rows)
    print_rows(
        f"(f) teacher's forward: {options.sequences} answers of {options.answer} tokens behind "
        f"prompts of {options.length}, behind a document of {options.document}; the store has "
        f"{store.bytes / 2**20:.0f} MiB",
        rows,
    )
