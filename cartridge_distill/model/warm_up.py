"""Compiling the attention once, before the first step, over the shapes that will come.

A run of one model needs four graphs, whatever its lengths: a document from nothing; anything behind
a prefix without gradients; and the student's first layer, whose queries need no gradient, and its
later ones, whose queries do. Each takes 11 to 22 seconds on two cores, so they are named while one
waits for them, and a graph that appears later is a warning with its shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from cartridge_distill.cartridge.kv_shape import text_config
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.model import flex
from cartridge_distill.model.attention import resolve_backend
from cartridge_distill.model.blocks import BLOCK
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.packing import pack
from cartridge_distill.model.prefill import prefix_from_tokens

_SEQUENCES, _LENGTH = 100, 3  # short: they must fit behind any prefix


def compile_attention(
    model: nn.Module,
    backend: str = "auto",
    around_student: Callable[[], AbstractContextManager[None]] = nullcontext,
    say: Callable[[str], None] = print,
) -> int:
    """Runs the forwards of a training step on a few tokens; nothing where nothing is compiled.

    Args:
        model: the frozen base, on its device.
        around_student: what a step puts around the student's forward (recomputed layers).
        say: gets a line for each forward, and one at the end.

    Returns:
        How many graphs were compiled.

    Raises:
        AttentionCompileError: one cannot be.
    """
    device = next(model.parameters()).device
    if resolve_backend(backend, device) != "flex" or not flex.compiles_on(device):
        return 0
    before, start = len(flex.graphs()), time.perf_counter()
    jobs = list(_jobs(model, backend, around_student))
    for number, (name, job) in enumerate(jobs, 1):
        began = time.perf_counter()
        job()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
        say(f"compiling attention: {number} of {len(jobs)}, {name}, {seconds:.0f} s")
    flex.no_more_expected()
    count = len(flex.graphs()) - before
    say(f"attention compiled: {count} graphs, {time.perf_counter() - start:.0f} s")
    return count


def _jobs(
    model: nn.Module,
    backend: str,
    around_student: Callable[[], AbstractContextManager[None]],
) -> Iterator[tuple[str, Callable[[], object]]]:
    device = next(model.parameters()).device
    cartridge = TrainableCache.from_random(text_config(model.config), BLOCK).to(device)
    batch = pack([torch.zeros(_LENGTH, dtype=torch.long, device=device)] * _SEQUENCES)
    first = batch.index == 0  # one row of logits a sequence

    @torch.no_grad()
    def behind() -> None:
        packed_forward(model, cartridge.prefix(), batch, first, backend)

    def student() -> None:
        with around_student():
            logits = packed_forward(model, cartridge.prefix(), batch, first, backend)
        torch.autograd.grad(logits.float().mean(), cartridge.trainable_parameters())

    document = torch.zeros(_SEQUENCES, dtype=torch.long, device=device)
    yield "a document", lambda: prefix_from_tokens(model, document, backend)
    yield "behind a document", behind
    yield "the student with gradients", student
