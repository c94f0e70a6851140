"""What must hold before a micro-batch is trained on, and the one transfer that tells.

Versions are known on the host. Everything else is computed on the device first and fetched
together, so that the host waits once for student and teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.distill.loss import TeacherTopK
from cartridge_distill.distill.mixing import STUDENT, TEACHER
from cartridge_distill.distill.teacher import not_finite
from cartridge_distill.model.float32_forward import float32_logprobs, leading
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.logprobs import chosen_logprobs
from cartridge_distill.model.packing import HostMask, on_device, pack
from verl_patches.actor.device import StageSeconds, fetch
from verl_patches.actor.kept_versions import KeptVersions, OwnLogprobs
from verl_patches.actor.logprob_check import (
    LogprobDifferences,
    OfStudent,
    RoundingCheck,
    VersionPair,
)
from verl_patches.actor.samples import Samples


def answer_temperature(samples: Samples, teacher_temperature: float | None) -> float | None:
    """At which the teacher's answers were sampled; None when there are none.

    Args:
        teacher_temperature: as the settings have it; None is the rollout's.
    """
    if TEACHER not in samples.authors:
        return None
    return samples.temperature if teacher_temperature is None else float(teacher_temperature)


@dataclass(frozen=True)
class Computed:
    """What the forwards of one micro-batch gave, on the device.

    Attributes:
        tokens: ``[N]`` the counted tokens.
        logits: ``[N, V]`` of the student, detached.
        teacher: distributions over the same tokens, not looked at yet.
        loss: scalar.
        more: further numbers to be fetched with the rest; scalars, by name.
    """

    tokens: Tensor
    logits: Tensor
    teacher: TeacherTopK
    loss: Tensor
    more: Mapping[str, Tensor] = field(default_factory=dict)


class StepChecks:
    """The checks of one engine.

    Args:
        bound: on the largest difference of server and trainer; None compares with the rounding.
        model: the frozen base, sharded or not.
        teacher_temperature: of the teacher's answers; None is the rollout's.
        backend: attention backend of the engine.
        stage: times what the checks compute besides.
        async_steps: how many steps earlier a sample's version may be.
        everybody: whether all ranks answer yes.
    """

    def __init__(
        self,
        bound: float | None,
        model: nn.Module,
        teacher_temperature: float | None,
        backend: str,
        stage: StageSeconds,
        async_steps: int = 0,
        everybody: Callable[[bool], bool] = lambda answer: answer,
    ) -> None:
        self._bound, self._everybody, self._async_steps = bound, everybody, async_steps
        self._teacher_temperature = teacher_temperature
        self._model, self._backend, self._stage = model, backend, stage
        self._dtype = next(model.parameters()).dtype
        # With a bound on the largest difference, nothing else is measured.
        self._rounding = RoundingCheck(self._dtype, everybody) if bound is None else None
        # Where both round, the version before the oldest is asked about, too.
        count = async_steps + (bound is None)
        self.kept = KeptVersions(count, self._dtype, on_host=async_steps > 0)

    def begin_batch(self) -> None:
        """Before the first micro-batch of a batch."""
        if self._rounding is not None:
            self._rounding.begin_batch()

    def forget(self) -> None:
        """After a checkpoint was loaded."""
        self.kept.forget()
        if self._rounding is not None:
            self._rounding.forget()

    def remember(self, version: int, prefix: Prefix) -> None:
        """Before the optimizer moves the cartridge, at the first of a batch's steps."""
        self.kept.remember(version, prefix)

    def run(
        self,
        samples: Samples,
        found: Computed,
        version: int,
        stale: bool,
        cartridge: Prefix,
        own: OwnLogprobs | None = None,
    ) -> dict[str, float]:
        """Checks a micro-batch.

        Args:
            version: that is trained, and that the student's tokens should be of.
            stale: optimizer steps were taken on this batch already. The trainer has moved away from
                the server by intent; the difference is a metric of its own.
            cartridge: the student's prefix.
            own: where samples may be of earlier versions: what those have instead of the student's
                forward.

        Returns:
            Metrics, and ``loss``.

        Raises:
            OffPolicyError: log-probs that are not those of whoever wrote the tokens.
            DocumentError: the teacher's logits are not finite.
            FloatingPointError: the loss is not finite.
        """
        trainer = chosen_logprobs(found.logits, found.tokens, samples.temperature)
        server = on_device(samples.rollout_logprobs, trainer.device, trainer.dtype)
        written = trainer if own is None else own.or_else(trainer)
        mine = ~samples.by_teacher if own is None else own.compared
        compared = _compared(samples, mine, written, server, found)
        counted = [
            differences.absolute
            for author, differences in compared.items()
            if not (author == STUDENT and stale)
        ]
        assert found.teacher.finite is not None
        values = {f"largest/{a}": differences.absolute.max() for a, differences in compared.items()}
        values |= {
            "loss": found.loss,
            "finite": found.teacher.finite,
            "student_logprob": trainer.mean(),
            "teacher_tail_mass": found.teacher.tail_logprob.exp().mean(),
            **found.more,
        }
        if counted:
            values["logprob_diff/mean"] = torch.cat(counted).mean()
        if self._rounding is not None:
            theirs = on_device(samples.by_teacher, trainer.device)
            counted_mine = ~theirs if own is None else on_device(mine, trainer.device)
            tokens = OfStudent(trainer, written, server, counted_mine)
            values |= self._figures(samples, tokens, theirs, found, version, stale, cartridge)
        fetched = fetch(values)  # the one time that the host waits for student and teacher

        got = {name: figures[0] for name, figures in fetched.items() if len(figures) == 1}
        for author, differences in compared.items():
            moved = author == STUDENT and stale
            differences.check(got[f"largest/{author}"], None if moved else self._bound)
        if self._rounding is not None:
            got |= self._rounding.judge(fetched)
        if not got.pop("finite"):
            raise not_finite(samples.document_ids)
        if not math.isfinite(got["loss"]):
            raise FloatingPointError(
                f"the distillation loss is {got['loss']}; nothing was trained on it"
            )
        largest = {author: got.pop(f"largest/{author}") for author in compared}
        if TEACHER in largest:
            got["logprob_diff/teacher_max"] = largest[TEACHER]
        if stale and STUDENT in largest:
            got["stale_logprob_diff/max"] = largest.pop(STUDENT)
        if largest:
            got["logprob_diff/max"] = max(largest.values())
            if self._bound is not None:
                got["logprob_diff/bound"] = self._bound  # the report draws it
        return got

    def _figures(
        self,
        samples: Samples,
        tokens: OfStudent,
        theirs: Tensor,
        found: Computed,
        version: int,
        stale: bool,
        cartridge: Prefix,
    ) -> dict[str, Tensor]:
        """What the test in units of the rounding wants to know of a micro-batch."""
        assert self._rounding is not None
        figures = {}
        if not stale:
            # Also when the teacher wrote all of it: every rank runs the model equally often.
            ways = (partial(way, samples) for way in (self._behind, self._exactly))
            pair = partial(self._pair, samples, version, cartridge, theirs)
            figures = self._rounding.student_figures(version, tokens, pair, cartridge, *ways)
        if found.teacher.chosen is not None:
            # Greedy leaves the logits alone.
            at = answer_temperature(samples, self._teacher_temperature) or 1.0
            ratio = at / (samples.temperature or 1.0)
            chosen = found.teacher.chosen
            figures |= self._rounding.teacher_figures(chosen, tokens.server, theirs, ratio)
        return figures

    def _pair(
        self, samples: Samples, version: int, cartridge: Prefix, theirs: Tensor
    ) -> VersionPair | None:
        """The version of the first sample of the student's, and the one before it."""
        device, counted = theirs.device, ~theirs
        own: Prefix | None = cartridge
        if self._async_steps:
            steps = zip(samples.authors, samples.steps, strict=True)
            labelled = (step for author, step in steps if author != TEACHER and step is not None)
            asked = next(labelled, version)
            if asked != version:
                own = self.kept.get(asked, device)
            version = asked
            of_it = samples.tokens_of([step == version for step in samples.steps])
            counted = on_device(of_it, device)
        before = self.kept.get(version - 1, device)
        is_known = own is not None and before is not None
        if self._async_steps:  # else it is known to all ranks or to none
            is_known = self._everybody(is_known)
        if not is_known or own is None or before is None:
            return None
        return VersionPair(version, own, before, counted)

    @torch.no_grad()
    def _behind(self, samples: Samples, prefix: Prefix) -> Tensor:
        """Log-probs of the first samples' counted tokens behind another cartridge."""
        count = leading(samples.sequences, samples.response_masks)
        batch = pack(samples.sequences[:count]).to(prefix.keys[0].device)
        response_mask = np.concatenate(samples.response_masks[:count])
        with self._stage("version_check"):
            logit_mask = batch.predicts(response_mask)
            logits = packed_forward(self._model, prefix, batch, logit_mask, self._backend)
            return chosen_logprobs(logits, batch.tokens(response_mask), samples.temperature)

    def _exactly(self, samples: Samples, prefix: Prefix) -> Tensor:
        """Of the same tokens, without rounding, behind the cartridge as a server has it."""
        count = leading(samples.sequences, samples.response_masks)
        some = samples.sequences[:count], samples.response_masks[:count]
        with self._stage("version_check"):
            return float32_logprobs(self._model, prefix, *some, samples.temperature, self._dtype)


def _compared(
    samples: Samples, by_student: HostMask, written: Tensor, server: Tensor, found: Computed
) -> dict[str, LogprobDifferences]:
    """The tokens of each author against the forward of whoever wrote them."""
    compared = {}
    for author, tokens, numbers in (
        (STUDENT, by_student, written),
        (TEACHER, samples.by_teacher, found.teacher.chosen),
    ):
        if not tokens.any():
            continue
        assert numbers is not None
        rows = on_device(np.flatnonzero(tokens), server.device, torch.long)
        compared[author] = LogprobDifferences(
            author, numbers[rows], server[rows], found.tokens[rows]
        )
    return compared
