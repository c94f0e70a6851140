"""The predicted memory of a step, beside the storages that the step really makes.

The step is the project's own: packed student forward with gradients, reading of the document, the
teacher's scores, loss, backward, AdamW; on shapes alone (``meta``), with a stand-in for compiled
FlexAttention that takes and keeps what the kernel does. A GPU's fragments are not in it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cartridge_distill import flex
from cartridge_distill.cartridge import TrainableCache
from cartridge_distill.document_store import DocumentStore
from cartridge_distill.errors import ConfigError
from cartridge_distill.forward import packed_forward, recomputing_layers
from cartridge_distill.logprobs import chosen_logprobs
from cartridge_distill.loss import get_loss
from cartridge_distill.memory_plan import MemoryPlan, StepShape, check_fits, predict_step
from cartridge_distill.model_shape import ModelShape
from cartridge_distill.models import prepare_model
from cartridge_distill.packing import pack
from cartridge_distill.prefix import Prefix
from cartridge_distill.teacher import Teacher
from tests.live_storages import LiveStorages, flex_memory
from training.benchmark_memory import LLAMA_3B

TOLERANCE = 0.1  # of the peak
SEQUENCE = 512


def config_of(kind: str, **other: Any) -> Any:
    return AutoConfig.for_model(kind, **{**LLAMA_3B, **other})


def measure(config: Any, step: StepShape, explain: bool = False) -> LiveStorages:
    """Peaks by stage of the second of two steps about one document, which is read again."""
    with torch.device("meta"):
        model = prepare_model(AutoModelForCausalLM.from_config(config, dtype=step.dtype))
        text = config.get_text_config(decoder=True)
        shape = (1, text.num_key_value_heads, step.cartridge_tokens, text.head_dim)
        layers = [torch.empty(shape) for _ in range(text.num_hidden_layers)]
        cartridge = TrainableCache(Prefix(layers, layers))
    del layers
    teacher = Teacher(
        model,
        DocumentStore({"document": "text"}),
        lambda _: [0] * step.document_tokens,
        backend=step.backend,
    )
    count = step.row_tokens // step.longest
    sequences = [torch.zeros(step.longest, dtype=torch.long) for _ in range(count)]
    trained = step.trained // count
    wanted = [(torch.arange(step.longest) >= step.longest - trained).numpy()] * count
    mask = torch.cat([torch.from_numpy(part) for part in wanted])
    optimizer = torch.optim.AdamW(cartridge.trainable_parameters(), foreach=False)
    with LiveStorages(explain) as storages:
        storages.hold(model, cartridge)
        for parameter in cartridge.trainable_parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the moments
        if step.micro_batches == 1:
            optimizer.zero_grad(set_to_none=True)
        storages.peaks.clear()
        batch = pack(sequences).to("cuda")
        recomputing = recomputing_layers(model) if step.gradient_checkpointing else nullcontext()
        with storages("student forward"), recomputing:
            keep = batch.predicts(mask)
            logits = packed_forward(model, cartridge.prefix(), batch, keep, step.backend)
        with storages("document"):
            teacher.prefix("document")
        with storages("teacher forward"):
            top = teacher.score(sequences, wanted, ["document"] * count, step.topk)
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


def compare(config: Any, step: StepShape, of_stages: float) -> MemoryPlan:
    """Holds the peak to :data:`TOLERANCE`, and each stage to ``of_stages``."""
    plan, found = predict_step(ModelShape.of(config), step), measure(config, step)
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


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("document", [10_000, 100_000])
@pytest.mark.parametrize("row", [2048, 8192])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3_text"])
def test_flex_memory_at_the_shape_of_3b(
    flex_memory_alone: None, kind: str, row: int, document: int, checkpointing: bool
) -> None:
    step = StepShape(
        cartridge_tokens=2048,
        row_tokens=row,
        document_tokens=document,
        trained_tokens=row * 7 // 8,
        sequence_tokens=SEQUENCE,
        gradient_checkpointing=checkpointing,
    )
    compare(config_of(kind), step, of_stages=0.15)
