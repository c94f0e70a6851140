"""FlexAttention: its masks from the lengths, and how often it compiles.

Without a GPU nothing of inductor's is launched. Dynamo decides when to compile, by the same guards
on every device, so graphs are counted on a CPU with a backend that runs them as they are, backward
included. That they compile for a GPU is benchmarks/compile_for_gpu.py's to show.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.model import flex
from cartridge_distill.model.blocks import (
    BLOCK,
    LEAST_ROW,
    classify,
    filled_prefix,
    make_block_mask,
)
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.layout import PackedLayout
from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.packing import PackedBatch, pack
from cartridge_distill.model.prefill import prefix_from_tokens
from cartridge_distill.model.warm_up import compile_attention
from cartridge_distill.util.errors import AttentionCompileError
from tests.tiny import VOCAB, random_cartridge, tiny_model


def batch_of(lengths: list[int]) -> PackedBatch:
    return pack([torch.zeros(n, dtype=torch.long) for n in lengths]).filled_up(BLOCK, LEAST_ROW)


def allowed(batch: PackedBatch, prefix_tokens: int, window: int | None) -> np.ndarray:
    """The rule token by token, by the dense reference, with the prefix's filling put in."""
    keys = torch.zeros(1, 1, prefix_tokens, 1)
    prefix = None
    if prefix_tokens:
        from cartridge_distill.cartridge.prefix import Prefix

        prefix = Prefix([keys], [keys])
    plain = PackedLayout(batch, prefix, "dense").allowed(window).numpy()
    filling = filled_prefix(prefix_tokens) - prefix_tokens
    nobody = np.zeros((batch.num_tokens, filling), dtype=bool)
    return np.concatenate([plain[:, :prefix_tokens], nobody, plain[:, prefix_tokens:]], axis=1)


@pytest.mark.parametrize("window", [None, 1, 24, 127, 128, 129, 300, 1000])
@pytest.mark.parametrize("seed", range(6))
def test_blocks_are_those_of_the_rule(seed: int, window: int | None) -> None:
    """Each block is full, partial or empty as the rule says; the mask function is the rule."""
    draw = random.Random(seed)
    prefix_tokens = draw.choice([0, 1, 127, 128, 200, 384])
    longest = draw.choice([1, 20, 128, 500])
    batch = batch_of([draw.randint(1, longest) for _ in range(draw.randint(1, 9))])
    rule = allowed(batch, prefix_tokens, window)
    shape = (batch.num_tokens // BLOCK, BLOCK, rule.shape[1] // BLOCK, BLOCK)
    blocks = rule.reshape(shape).swapaxes(1, 2)
    partial, full = classify(batch, prefix_tokens, window)
    # Not `==` for partial: a block may be looked at although all of it is visible or none of a
    # prefix's last, filled one is. Nothing visible may be missed, nothing hidden called full.
    assert np.array_equal(full | partial, blocks.any((2, 3)))
    assert not (full & ~blocks.all((2, 3))).any()
    assert (blocks.all((2, 3)) & ~full).sum() == 0
    mask = make_block_mask(batch, prefix_tokens, window)
    query, key = torch.meshgrid(*map(torch.arange, rule.shape), indexing="ij")
    assert np.array_equal(mask.mask_mod(None, None, query, key).numpy(), rule)


def test_the_mask_of_a_hundred_thousand_tokens_takes_megabytes() -> None:
    mask = make_block_mask(batch_of([100_000]), 2048, None)
    tensors = [value for value in vars(mask).values() if isinstance(value, Tensor)]
    assert 0 < sum(tensor.nbytes for tensor in tensors) < 32 * 2**20


def test_a_row_of_no_whole_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="300 tokens is not a multiple of 128"):
        classify(pack([torch.zeros(300, dtype=torch.long)]), 0, None)


def test_what_fills_a_row_up_has_no_position_that_its_sequences_have_not() -> None:
    """Else it could be over the model's context, or change how positions are scaled."""
    batch = batch_of([37, 5, 60])
    assert batch.num_tokens == 256 and batch.lengths[:3] == (37, 5, 60)
    assert batch.index.max() == 59 and sum(batch.lengths) == 256
    assert batch_of([1]).index.max() == 0


# ---------------------------------------------------------------- compiling


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Attention goes through dynamo on the CPU; a line for each graph."""
    import torch.nn.attention.flex_attention as module

    seen: list[str] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        seen.append(" ".join(str(tuple(v.shape)) for v in inputs if isinstance(v, Tensor)))
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    flex._compiled.cache_clear()
    monkeypatch.setattr(flex, "compiles_on", lambda device: True)
    monkeypatch.setattr(flex, "inductor", backend)
    monkeypatch.setattr(flex, "_all_expected", False)
    monkeypatch.setattr(module, "_validate_device", lambda *_: None)  # refuses gradients on a CPU
    yield seen
    torch._dynamo.reset()
    flex._compiled.cache_clear()


def gradients(
    model: Any, cartridge: TrainableCache, batch: PackedBatch, backend: str
) -> tuple[Tensor, ...]:
    logits = packed_forward(model, cartridge.prefix(), batch, backend=backend)
    loss = logits.float().log_softmax(-1)[:, 5].mean()
    return logits.detach(), *torch.autograd.grad(loss, cartridge.trainable_parameters())


@pytest.mark.parametrize(
    "kind",
    [
        "gemma2",  # a soft cap, layers with a window and without
        *(
            pytest.param(kind, marks=pytest.mark.long)
            for kind in ("llama", "qwen2", "qwen3", "mistral_window", "gemma", "gemma3")
        ),
    ],
)
def test_after_the_warm_up_nothing_compiles_anew(kind: str, counted: list[str]) -> None:
    """Four graphs for whatever lengths come, and they compute what the dense reference does."""
    model = prepare_model(tiny_model(kind))
    lines: list[str] = []
    compile_attention(model, "flex", say=lines.append)
    assert len(counted) == 4
    assert [line.split(",")[0] for line in lines[:3]] == [
        f"compiling attention: {n} of 3" for n in (1, 2, 3)
    ]
    draw = random.Random(0)

    def ids(most: int) -> Tensor:
        return torch.tensor([draw.randrange(3, VOCAB) for _ in range(draw.randint(1, most))])

    for prefix_tokens, most, count in (
        *((2, 1, 1), (16, 3, 2), (128, 128, 2), (129, 90, 7), (300, 60, 9), (256, 256, 1)),
    ):
        cartridge = random_cartridge(model, prefix_tokens)
        batch = pack([ids(most) for _ in range(count)])
        for mine, reference in zip(
            *(gradients(model, cartridge, batch, backend) for backend in ("flex", "dense")),
            strict=True,
        ):
            torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-4)
        document = ids(400)
        in_pieces = prefix_from_tokens(model, document, "flex", at_once=150)
        whole = prefix_from_tokens(model, document, "dense")
        for mine, reference in zip(in_pieces.keys, whole.keys, strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-4)
    assert len(counted) == 4, counted


def test_too_many_graphs_are_an_error_with_the_shape_and_nothing_runs_unfused(
    counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepare_model(tiny_model())
    monkeypatch.setattr(flex, "MOST_GRAPHS", 1)
    batch = pack([torch.arange(5, 12)])
    with torch.no_grad():
        packed_forward(model, None, batch, backend="flex")
        with pytest.raises(
            AttentionCompileError, match=r"\(1, 4, 256, 16\) queries.*at most 1.*attention=dense"
        ):
            packed_forward(model, random_cartridge(model, 300).prefix(), batch, backend="flex")


def test_what_cannot_be_compiled_is_an_error_with_the_shape(
    counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_kernel(graph: Any, inputs: list[Any]) -> Any:
        raise RuntimeError("NoValidChoicesError: no choices to select")

    monkeypatch.setattr(flex, "inductor", no_kernel)
    with pytest.raises(AttentionCompileError, match=r"256, 16\) queries.*no choices to select"):
        packed_forward(
            prepare_model(tiny_model()), None, pack([torch.arange(5, 12)]), backend="flex"
        )


def test_a_graph_after_the_warm_up_is_a_warning_with_its_shape(
    counted: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()  # the real backend, called as dynamo calls it, with a compiler that is none
    monkeypatch.setattr(flex, "_graphs", [])
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, inputs: graph)
    caplog.set_level(logging.INFO, logger=flex.__name__)
    monkeypatch.setattr(flex, "_all_expected", False)
    flex.inductor(None, [torch.zeros(1, 4, 256, 16)])
    flex.no_more_expected()
    flex.inductor(None, [torch.zeros(1, 4, 384, 16, requires_grad=True)])
    first, second = caplog.records
    assert (first.levelname, second.levelname) == ("INFO", "WARNING")
    assert "after the warm-up" in second.getMessage() and "(1, 4, 384, 16)" in second.getMessage()
    assert [graph.shapes.endswith("with gradients") for graph in flex.graphs()] == [False, True]
