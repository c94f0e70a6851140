"""How near a student's next-token distributions are to a teacher's, beside the loss.

``topk_overlap`` is the part of the teacher's K likeliest tokens that are among the student's K; in
on-policy distillation that works it rises (arXiv 2604.13016). ``topk_overlap_mass`` is what these
shared tokens have of each one's probability, the mean of both: near 1, all that either would say is
known to the other. ``student_entropy`` is ``-sum q log q`` over the whole vocabulary, nats: a
student that is sure of what it does not know has a low one and a large loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cartridge_distill.distill.loss import TeacherTopK
from cartridge_distill.model.logprobs import rows_at_once, tempered


@dataclass(frozen=True)
class Overlap:
    """At N places.

    Attributes:
        share: ``[N]``, 0 to 1.
        mass: ``[N]``, 0 to 1.
        entropy: ``[N]`` nats.
    """

    share: Tensor
    mass: Tensor
    entropy: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, logits: Tensor, teacher: TeacherTopK, temperature: float = 1.0) -> Overlap:
        """Needs no forward: everything follows from what the loss is computed of.

        Args:
            logits: ``[N, V]`` of the student.
            teacher: its K likeliest tokens at the same places and temperature.
        """
        count = rows_at_once(logits)
        blocks = zip(
            *(each.split(count) for each in (logits, teacher.ids, teacher.logprobs)),
            strict=True,
        )
        found = [cls._of_rows(tempered(rows, temperature), i, lp) for rows, i, lp in blocks]
        return cls(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    @staticmethod
    def _of_rows(scaled: Tensor, ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        student = scaled.log_softmax(-1)
        q = student.exp()
        own = student.topk(ids.shape[1], dim=-1).indices
        shared = (ids[:, :, None] == own[:, None, :]).any(-1)  # which of the teacher's
        masses = (logprobs.exp() + torch.gather(q, 1, ids)) * shared
        # A token that is ruled out has no part in the entropy: 0 * -inf is 0 here.
        entropy = -torch.where(q > 0, q * student, 0.0).sum(-1)
        return shared.float().mean(-1), masses.sum(-1) / 2, entropy
