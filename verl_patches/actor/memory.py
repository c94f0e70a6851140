"""Does a step fit? Said in one line at start, and refused when it cannot, before anything is read.

The engine knows the rows' length and the documents, not how many tokens of a row are trained on. So
a run is refused when a step cannot fit with a single one, and warned when it may not with all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from cartridge_distill.distill.memory_plan import check_fits, predict_step
from cartridge_distill.distill.step_shape import StepShape
from cartridge_distill.model.attention import resolve_backend
from cartridge_distill.model.shape import DecoderShape
from cartridge_distill.util.errors import ConfigError

KEYS = {
    "row_tokens": "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "gradient_checkpointing": "actor_rollout_ref.model.enable_gradient_checkpointing",
    "documents_kept": "actor_rollout_ref.actor.cartridge.teacher_cache_documents",
    "prompts_kept_mib": "actor_rollout_ref.actor.cartridge.teacher_cache_prompt_mib",
    "cartridge_tokens": "actor_rollout_ref.actor.cartridge.num_tokens",
}
"""What veRL's users call the fields of :class:`StepShape`."""


def free_bytes(device: torch.device) -> int | None:
    """What a GPU has for this process, what torch holds already included; None on a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def check_memory(engine: Any, module: Any, say: Callable[[str], None]) -> None:
    """Predicts the largest step of a run on a GPU and says it; on a CPU nothing is said.

    Args:
        engine: with veRL's configurations, the cartridge's settings and the teacher.
        module: the frozen model, not sharded yet.
        say: takes the line.

    Raises:
        ConfigError: not even a step with one trained token and one document fits the GPU.
    """
    free = free_bytes(engine.teacher.device)
    if free is None:
        return
    config = engine.engine_config
    row = config.max_token_len_per_gpu if config.use_dynamic_bsz else None
    if row is None:
        say("memory of a step not predicted: micro-batches have no bound in tokens")
        return
    try:
        model = DecoderShape.of(module.config)
    except ConfigError as error:
        say(str(error))
        return
    settings, teacher = engine.settings, engine.teacher
    documents = teacher.documents
    longest = max(documents.ids, key=lambda name: len(documents.text(name)))
    step = StepShape(
        cartridge_tokens=settings.num_tokens,
        row_tokens=row,
        document_tokens=len(teacher.document_ids(longest)),
        documents=len(documents.ids),
        documents_kept=settings.teacher_cache_documents,
        prompts_kept_mib=settings.teacher_cache_prompt_mib,
        dtype=next(module.parameters()).dtype,
        backend=resolve_backend(settings.attention, teacher.device),
        gradient_checkpointing=engine.model_config.enable_gradient_checkpointing,
        ranks=torch.distributed.get_world_size(),
        topk=settings.topk,
    )
    most = predict_step(model, step)
    least = predict_step(model, replace(step, trained_tokens=1, documents=1, micro_batches=1))
    check_fits(least, free, KEYS)
    fits = f"the GPU has {free / 2**30:.2f} GiB for it"
    if most.peak > free:
        fits += (
            ", which may not do when all tokens of a row are trained on; what makes it smaller: "
        )
        fits += "; ".join(most.advice(KEYS)) or "a GPU with more memory"
    say(f"{most.line()}; {fits}")
