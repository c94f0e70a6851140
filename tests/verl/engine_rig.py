"""The engine as veRL's training worker builds and drives it, on a tiny model, without Ray."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from tensordict import TensorDict
from torch import Tensor
from transformers import PreTrainedModel

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.data.records import Question, save_questions
from tests.tiny import VOCAB, plain_logprobs, tiny_model
from verl_patches.hooks import distill_loss

TEMPERATURE = 0.7
DOCUMENTS = {"red": "The red house stands by the sea. " * 3, "blue": "The blue boat is new. " * 4}
Shape = tuple[int, int, str | None]
# (prompt, response, document or None for a general row): a response of length 1 and one of the
# maximum in one batch.
SHAPES: list[Shape] = [(5, 1, "red"), (20, 16, "blue"), (3, 4, "red"), (9, 16, "blue")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def process_group(rank: int = 0, ranks: int = 1, port: int | None = None) -> Iterator[None]:
    """Real gloo, also for one rank, and veRL on a CPU."""
    from verl.plugin.platform import platform_manager

    import verl_patches.platform.cpu as cpu

    before = platform_manager._current_platform
    platform_manager._current_platform = cpu.PlatformCPU()
    address = f"tcp://127.0.0.1:{port or free_port()}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        platform_manager._current_platform = before


def build_engine(
    model_folder: Path,
    folder: Path,
    *,
    dtype: str = "fp32",
    optim: dict[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    **cartridge: Any,
) -> Any:
    """An engine from veRL's own config classes; ``folder`` takes the documents."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import (
        CartridgeConfig,
        FSDPEngineConfig,
        FSDPOptimizerConfig,
        HFModelConfig,
    )

    from verl_patches.actor.engine import CartridgeEngine

    documents = folder / "documents.jsonl"
    documents.write_text(
        "\n".join(json.dumps({"document_id": k, "text": v}) for k, v in DOCUMENTS.items())
    )
    model = HFModelConfig(
        path=str(model_folder),
        use_remove_padding=False,
        enable_gradient_checkpointing=gradient_checkpointing,
    )
    settings: dict[str, Any] = {
        "num_tokens": 32,
        "lr": 0.02,
        "documents": str(documents),
        "init_document": "red",
        "sync_dir": str(folder),
        **cartridge,
    }
    model.cartridge = CartridgeConfig(enabled=True, **settings)
    optimizer = {"lr": 1.0, "weight_decay": 0.0, "total_training_steps": 10, **(optim or {})}
    engine = CartridgeEngine(
        model,
        FSDPEngineConfig(strategy="fsdp2", model_dtype=dtype, use_torch_compile=False),
        FSDPOptimizerConfig(**optimizer),
        CheckpointConfig(),
    )
    engine.initialize()
    return engine


def questions_file(folder: Path) -> Path:
    """Held-out questions about both documents."""
    options = ("by the sea", "in a town", "new", "old", "nowhere")
    questions = [
        Question("red", "Where is the house?", options, 0, "The red house stands"),
        Question("blue", "How is the boat?", options, 2),
        Question("blue", "What is the boat?", options, 2, "The blue boat is"),
    ]
    save_questions(folder / "eval.json", questions)
    return folder / "eval.json"


def rollouts(
    engine: Any,
    seed: int = 0,
    shapes: Sequence[Shape] = tuple(SHAPES),
    take: Sequence[int] | None = None,
    micro_batch: int = 2,
    by_teacher: Sequence[int] = (),
    teacher_temperature: float = TEMPERATURE,
    server: PreTrainedModel | None = None,
    served: Prefix | Sequence[Prefix] | None = None,
    temperature: float = TEMPERATURE,
    versions: Sequence[int] | None = None,
) -> TensorDict:
    """A batch in veRL's form; the log-probs come from plain one-by-one transformers forwards.

    Args:
        take: the rows of this rank; all by default. The rows themselves do not depend on it.
        micro_batch: rows at once.
        by_teacher: rows whose log-probs are those of a plain forward over document and prompt.
        teacher_temperature: of those rows.
        server: the model of the forwards; the tiny one in float32 by default.
        served: its cartridge, or one for each row; the engine's own by default.
        temperature: of the student's rows, as the server has it; the trainer is told another.
        versions: that each row says it is of, the engine's own by default.
    """
    from verl.utils import tensordict_utils as tu

    generator = torch.Generator().manual_seed(seed)
    plain = server or tiny_model()
    dtype = next(plain.parameters()).dtype
    prefixes = served or engine.cartridge.prefix()
    if isinstance(prefixes, Prefix):
        prefixes = [prefixes] * len(shapes)
    names = ("input_ids", "prompts", "responses", "response_mask", "loss_mask", "rollout_log_probs")
    columns: dict[str, list[Tensor]] = {name: [] for name in names}
    chosen = list(range(len(shapes))) if take is None else list(take)
    for row, (prompt_length, length, document) in enumerate(shapes):
        prompt, response = (
            torch.randint(3, VOCAB - 3, (n,), generator=generator) for n in (prompt_length, length)
        )
        if row not in chosen:
            continue
        before: Prefix | None = prefixes[row].to(dtype=dtype)
        context, sampled_at = prompt.tolist(), temperature
        if row in by_teacher:
            before, sampled_at = None, teacher_temperature
            read = [] if document is None else engine.teacher.document_ids(document)
            context = read + context
        logprobs = plain_logprobs(plain, before, context, response.tolist(), sampled_at)
        ones = torch.ones(length, dtype=torch.long)
        ids = torch.cat([prompt, response])
        values = (ids, prompt, response, ones, ones.clone(), torch.tensor(logprobs))
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    data = tu.get_tensordict(
        {k: torch.nested.as_nested_tensor(v, layout=torch.jagged) for k, v in columns.items()},
        {
            "temperature": TEMPERATURE,
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": micro_batch,
        },
    )
    information = [
        {"document_id": shapes[row][2], "kind": "started" if shapes[row][2] else "general"}
        for row in chosen
    ]
    tu.assign_non_tensor_stack(data, "extra_info", information)
    labels = [
        {"author": "teacher"}
        if row in by_teacher
        else {"global_steps": engine.version if versions is None else versions[row]}
        for row in chosen
    ]
    tu.assign_non_tensor_stack(data, "extra_fields", labels)
    return data


def step(engine: Any, *mini_batches: TensorDict) -> dict[str, Any]:
    """What veRL's worker does with one batch; the metrics of its last optimizer step."""
    with engine.train_mode():
        for data in mini_batches:
            metrics: dict[str, Any] = engine.train_batch(data, distill_loss)
        metrics["metrics"]["lr"] = engine.lr_scheduler_step()
    return metrics


def loss_of(metrics: dict[str, Any]) -> float:
    """The batch's loss, over all ranks, as veRL's worker reports it."""
    total = torch.tensor(sum(metrics["loss"]), dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return float(total) / torch.distributed.get_world_size()
