"""Student and teacher over one micro-batch, and every token's loss: what a step is made of.

veRL's engine calls it between veRL's own calls; a plain loop (``training/study``) calls it by
itself. Nothing here imports veRL, knows of ranks or takes an optimizer's step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.distill.loss import TeacherTopK, top_ids
from cartridge_distill.distill.overlap import Overlap
from cartridge_distill.distill.teacher import Teacher
from cartridge_distill.distill.token_loss import TokenLoss
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.packing import on_device, pack
from verl_patches.actor.device import StageSeconds
from verl_patches.actor.samples import Samples
from verl_patches.actor.step_checks import Computed, answer_temperature
from verl_patches.actor.token_sums import token_sums


@dataclass(frozen=True)
class Scored:
    """N counted tokens of a micro-batch, on the device; nothing was fetched.

    Attributes:
        tokens: ``[N]`` ids.
        logits: ``[N, V]`` of the student, with their graph.
        teacher: distributions over the same tokens, not looked at yet.
        token_loss: ``[N]`` nats, zero where a token has no loss.
        sums: what the micro-batch adds to the step's means.
    """

    tokens: Tensor
    logits: Tensor
    teacher: TeacherTopK
    token_loss: Tensor
    sums: dict[str, Tensor]

    def computed(self, loss: Tensor) -> Computed:
        """For the checks of the step, with the micro-batch's share of its loss."""
        return Computed(self.tokens, self.logits.detach(), self.teacher, loss, self.sums)


def score(
    samples: Samples,
    module: Any,
    prefix: Prefix,
    teacher: Teacher,
    settings: Any,
    token_loss: TokenLoss,
    stage: StageSeconds,
    around_student: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Scored:
    """Both forwards and the losses.

    Args:
        module: the frozen base, of student and teacher.
        prefix: the cartridge; gradients flow back through it.
        settings: ``actor.cartridge``.
        around_student: stands around the student's forward alone.

    Raises:
        DocumentError: a sample's document is missing or too long.
    """
    batch = pack(samples.sequences).to(teacher.device)
    response_mask = np.concatenate(samples.response_masks)
    with stage("student_forward"), around_student():
        logit_mask = batch.predicts(response_mask)
        logits = packed_forward(module, prefix, batch, logit_mask, settings.attention)
    with stage("teacher_forward"):
        told = teacher.score(
            samples.sequences,
            samples.response_masks,
            samples.document_ids,
            settings.topk,
            settings.kl_temperature,
            chosen_at=answer_temperature(samples, settings.teacher_temperature),
            asked_ids=top_ids(logits.detach(), settings.topk) if token_loss.loss.asks else None,
        )
    with stage("loss"):
        counted = on_device(token_loss.counted(samples.answers), logits.device)
        losses, clipped = token_loss(logits, told, counted)
        overlap = Overlap.of(logits.detach(), told, settings.kl_temperature)
        sums = token_sums(overlap, losses, clipped, counted, samples.general)
    return Scored(batch.tokens(response_mask), logits, told, losses, sums)
