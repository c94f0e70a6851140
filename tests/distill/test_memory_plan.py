"""The predicted memory of a step, beside the storages that the step really makes.

The step is the project's own: packed student forward with gradients, reading of the document, the
teacher's scores, loss, backward, AdamW; on shapes alone (``meta``), with a stand-in for compiled
FlexAttention that takes and keeps what the kernel does. A GPU's fragments are not in it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.bases import LLAMA_3B, SHAPES
from cartridge_distill.cartridge.kv_shape import text_config
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.distill.loss import get_loss
from cartridge_distill.distill.memory_plan import MemoryPlan, check_fits, predict_step
from cartridge_distill.distill.step_shape import StepShape
from cartridge_distill.distill.teacher import Teacher
from cartridge_distill.model import flex, layout
from cartridge_distill.model.forward import packed_forward, recomputing_layers
from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.logprobs import chosen_logprobs
from cartridge_distill.model.packing import pack
from cartridge_distill.model.shape import DecoderShape
from cartridge_distill.util.errors import ConfigError
from tests.live_storages import LiveStorages, flex_memory

TOLERANCE = 0.05  # of the peak
SEQUENCE = 512


def config_of(kind: str, **other: Any) -> Any:
    return AutoConfig.for_model(kind, **{**SHAPES[LLAMA_3B], **other})


def measure(config: Any, step: StepShape, explain: bool = False) -> LiveStorages:
    """Peaks by stage of a step about a new document; those that the teacher keeps are there."""
    with torch.device("meta"):
        model = prepare_model(AutoModelForCausalLM.from_config(config, dtype=step.dtype))
        text = text_config(config)
        shape = (1, text.num_key_value_heads, step.cartridge_tokens, text.head_dim)
        layers = [torch.empty(shape) for _ in range(text.num_hidden_layers)]
        cartridge = TrainableCache(Prefix(layers, layers))
    del layers
    assert step.documents > step.documents_kept  # else none would be new
    teacher = Teacher(
        model,
        DocumentStore({"new": "text"}),
        lambda _: [0] * step.document_tokens,
        max_cached=step.documents_kept,
        backend=step.backend,
        prompt_mib=step.prompts_kept_mib,
    )
    shape = (*shape[:2], step.document_tokens, shape[3])
    count = step.row_tokens // step.longest
    sequences = [torch.zeros(step.longest, dtype=torch.long) for _ in range(count)]
    trained = step.trained // count
    response_masks = [(torch.arange(step.longest) >= step.longest - trained).numpy()] * count
    mask = torch.cat([torch.from_numpy(part) for part in response_masks])
    optimizer = torch.optim.AdamW(cartridge.trainable_parameters(), foreach=False)
    with LiveStorages(explain) as storages:
        storages.hold(model, cartridge)
        for number in range(step.documents_kept):
            parts = [
                [torch.empty(shape, dtype=step.dtype, device="cuda") for _ in cartridge.frozen_keys]
                for _ in range(2)
            ]
            teacher._cache[f"kept {number}"] = Prefix(*parts)
        del parts
        if teacher.prompts is not None:  # as it is from the first step on
            one = torch.empty(shape[1], 1, shape[3], dtype=step.dtype, device="cuda")
            for number in range(text.num_hidden_layers):
                teacher.prompts._tensors(number, one, one)
            del one
        for parameter in cartridge.trainable_parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the moments
        if step.micro_batches == 1:
            optimizer.zero_grad(set_to_none=True)
        storages.peaks.clear()
        batch = pack(sequences).to(torch.device("cuda", 0))
        recomputing = recomputing_layers(model) if step.gradient_checkpointing else nullcontext()
        with storages("student forward"), recomputing:
            logit_mask = batch.predicts(mask)
            logits = packed_forward(model, cartridge.prefix(), batch, logit_mask, step.backend)
        with storages("document"):
            teacher.prefix("new")
        with storages("teacher forward"):
            top = teacher.score(sequences, response_masks, ["new"] * count, step.topk)
        with storages("loss"):
            loss = get_loss("forward_kl_topk")(logits, top, 1.0).mean()
            chosen_logprobs(logits.detach(), batch.tokens(mask))
        del logits
        with storages("backward"):
            loss.backward()
        with storages("optimizer"):
            optimizer.step()
    return storages


@pytest.fixture
def flex_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "compile_and_call", flex_memory)
    # A layer that runs again in the backward sees no `cuda`, see SeenAsCuda.
    monkeypatch.setattr(flex, "fused", flex_memory)


def compare(config: Any, step: StepShape, of_stages: float) -> MemoryPlan:
    """Holds the peak to :data:`TOLERANCE`, and each stage to ``of_stages``."""
    plan, found = predict_step(DecoderShape.of(config), step), measure(config, step)
    said = [f"{'stage':<18}{'predicted':>12}{'made':>12}  GiB"]
    for stage in plan.stages:
        pair = (plan.of_stage(stage) / 2**30, found.peaks[stage].bytes / 2**30)
        said.append(f"{stage:<18}{pair[0]:>12.2f}{pair[1]:>12.2f}  {pair[0] / pair[1] - 1:+.1%}")
    table = "\n".join(said)
    print(f"\n{config.model_type} {step}\n{table}")
    assert abs(plan.peak / found.peak - 1) < TOLERANCE, table
    for stage in plan.stages:
        assert abs(plan.of_stage(stage) / found.peaks[stage].bytes - 1) < of_stages, table
    return plan


def of_3b(row: int, document: int, checkpointing: bool) -> StepShape:
    return StepShape(
        cartridge_tokens=2048,
        row_tokens=row,
        document_tokens=document,
        documents=2,
        documents_kept=1,
        trained_tokens=row * 7 // 8,
        sequence_tokens=SEQUENCE,
        gradient_checkpointing=checkpointing,
    )


KINDS = ["llama", "qwen3", "gemma2", "gemma3_text"]
both = pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])


@both
@pytest.mark.parametrize("kind", KINDS)
def test_flex_memory_of_six_layers(flex_memory_alone: None, kind: str, checkpointing: bool) -> None:
    compare(config_of(kind, num_hidden_layers=6), of_3b(2048, 10_000, checkpointing), 0.1)


@pytest.mark.long
@both
@pytest.mark.parametrize(
    ("kind", "row", "document"),
    [
        *(("llama", row, document) for row in (2048, 8192) for document in (10_000, 100_000)),
        # All 32 combinations were within 4 %; these are the largest of the others.
        *((kind, 8192, 100_000) for kind in KINDS[1:]),
    ],
)
def test_flex_memory_at_the_shape_of_3b(
    flex_memory_alone: None, kind: str, row: int, document: int, checkpointing: bool
) -> None:
    compare(config_of(kind), of_3b(row, document, checkpointing), 0.12)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["grouped", "dense"])
def test_memory_of_the_backends_that_keep_attention_weights(
    monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype, checkpointing: bool
) -> None:
    """No two tokens have the same past here, which meta tensors could not tell."""

    def all_computed(batch: Any, *_: Any) -> tuple[Any, Any]:
        return np.arange(batch.num_tokens), np.arange(batch.num_tokens)

    monkeypatch.setattr(layout, "_shared_beginnings", all_computed)
    step = replace(
        of_3b(1024, 600, checkpointing),
        cartridge_tokens=256,
        sequence_tokens=128,
        backend=backend,
        dtype=dtype,
    )
    compare(config_of("llama", num_hidden_layers=6), step, 0.1)


def plan_of_3b(**other: Any) -> MemoryPlan:
    shape = DecoderShape.of(config_of("llama"))
    return predict_step(shape, replace(of_3b(8192, 10_000, False), **other))


def test_a_step_that_cannot_fit_is_refused_with_what_helps() -> None:
    plan = plan_of_3b()
    check_fits(plan, plan.peak)
    with pytest.raises(ConfigError) as refused:
        check_fits(plan, 24 * 2**30, {"row_tokens": "ppo_max_token_len_per_gpu"})
    said = str(refused.value)
    assert f"at most {plan.peak / 2**30:.2f} GiB" in said and "24.00 GiB" in said
    assert "ppo_max_token_len_per_gpu 8192 -> 4096" in said
    assert "gradient checkpointing False -> True" in said


def test_advice_says_what_the_smaller_plan_really_saves() -> None:
    plan = plan_of_3b()
    first = plan.advice()[0]
    smaller = plan_of_3b(gradient_checkpointing=True)
    assert first == (
        f"gradient checkpointing False -> True: {(plan.peak - smaller.peak) / 2**30:.2f} GiB less"
    )
    assert not any("checkpointing" in line for line in smaller.advice())


def test_the_table_adds_up() -> None:
    plan = plan_of_3b()
    rows = [line.rsplit(maxsplit=2) for line in plan.describe().splitlines() if "GiB" in line]
    terms = [float(size) for name, size, _ in rows if name.strip() in plan.stages[plan.peak_stage]]
    assert abs(sum(terms) - plan.peak / 2**30) < 0.01 * len(terms)
    assert {name.strip() for name, _, _ in rows} >= set(plan.stages) | {"together"}


def test_several_ranks_share_the_weights() -> None:
    one, two = plan_of_3b(), plan_of_3b(ranks=2)
    assert two.stages["loss"]["weights"] < 0.75 * one.stages["loss"]["weights"]
    assert two.stages["loss"]["documents' KV"] == one.stages["loss"]["documents' KV"]


def test_kept_prompts_take_what_they_may_where_they_are_kept() -> None:
    without = plan_of_3b(backend="grouped", prompts_kept_mib=0)
    kept = plan_of_3b(backend="grouped", prompts_kept_mib=1024)
    token = 2 * DecoderShape.of(config_of("llama")).kv_numbers
    assert 0 <= 1024 * 2**20 - (kept.peak - without.peak) < token
    assert any("MiB of prompts kept 1024 -> 0: 1.00 GiB less" in line for line in kept.advice())
    assert plan_of_3b(prompts_kept_mib=1024).peak == plan_of_3b(prompts_kept_mib=0).peak


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"row_tokens": 0}, "row_tokens=0 is too few; fix: give 1 or more"),
        ({"trained_tokens": 9000}, "trained_tokens=9000 .*; fix: give 1 to row_tokens=8192"),
        ({"prompts_kept_mib": -1}, "prompts_kept_mib=-1 .*; fix: give 0 or more"),
        ({"backend": "sdpa"}, "backend='sdpa' .*; fix: choose flex, grouped or dense"),
    ],
)
def test_lengths_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(of_3b(8192, 10_000, False), **wrong)


def test_a_mixture_of_experts_is_not_predicted_as_something_else() -> None:
    with pytest.raises(ConfigError, match="qwen3_moe model cannot be predicted"):
        DecoderShape.of(config_of("qwen3_moe", num_hidden_layers=2))


@pytest.mark.parametrize(("kind", "gated"), [("llama", True), ("gpt_neox", False)])
def test_an_mlp_as_wide_as_the_model_is_one(kind: str, gated: bool) -> None:
    """All its layers have one shape, and which is the last cannot be told from it."""
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 640}
    shape = DecoderShape.of(AutoConfig.for_model(kind, **sizes))
    assert (shape.gated, shape.mlp) == (gated, 1024 if gated else 512)
