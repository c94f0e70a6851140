"""From a loss to what is trained: which tokens of an answer count, and how much one may weigh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cartridge_distill.distill.loss import Loss, TeacherTopK, get_loss
from cartridge_distill.model.packing import HostMask


@dataclass(frozen=True)
class TokenLoss:
    """A loss with its settings.

    Attributes:
        loss: per token.
        temperature: logits of both sides are divided by it.
        skip_first: the first so many tokens of each answer have no loss. The student's first words
            are often not the document's but its own manner ("Sure, here is"), and the distance
            there is large and teaches nothing about the document. SDFT's code leaves out the first
            3 (Shenfeld et al., arXiv 2601.19897).
        most: a token's loss counts as at most this, nats, and has no gradient above it; None for no
            bound. A token that the teacher rules out can weigh as much as a thousand others.
    """

    loss: Loss
    temperature: float = 1.0
    skip_first: int = 0
    most: float | None = None

    @classmethod
    def of(cls, settings: Any) -> TokenLoss:
        """As ``actor.cartridge`` has it.

        Raises:
            ConfigError: an unknown loss, or a weight that it does not take.
        """
        return cls(
            get_loss(settings.loss, settings.loss_weight),
            settings.kl_temperature,
            settings.skip_first_tokens,
            settings.max_token_loss,
        )

    def counted(self, answers: Sequence[int]) -> HostMask:
        """``[N]`` bool: which tokens of answers of these lengths have a loss."""
        return np.concatenate([np.arange(length) >= self.skip_first for length in answers])

    def __call__(
        self, logits: Tensor, teacher: TeacherTopK, counted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Every token's loss.

        Args:
            logits: ``[N, V]`` of the student.
            teacher: at the same places.
            counted: ``[N]`` bool, on the device.

        Returns:
            ``[N]`` nats, zero where a token does not count; ``[N]`` bool, whether it was over the
            bound.
        """
        found = torch.where(counted, self.loss(logits, teacher, self.temperature), 0.0)
        if self.most is None:
            return found, torch.zeros_like(counted)
        return found.clamp(max=self.most), found.detach() > self.most
