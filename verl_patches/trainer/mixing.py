"""Batches that student and teacher write together: the plan, the labels, the check, the counts.

The trainer plans each batch before it is sent out and checks the labels that come back; the agent
loop asks the one or the other (:mod:`verl_patches.rollout.teacher`). See
``cartridge_distill.distill.mixing``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from cartridge_distill.distill.mixing import (
    STUDENT,
    TEACHER,
    Schedule,
    TokenCounts,
    student_writes,
)
from cartridge_distill.distill.on_policy import check_versions
from cartridge_distill.util.errors import RolloutError
from verl_patches.rollout.teacher import EPOCH, PLAN


class Mixing:
    """The trainer's side.

    Args:
        config: veRL's whole configuration.
    """

    def __init__(self, config: Any) -> None:
        self.schedule = Schedule.of(config.actor_rollout_ref.actor.cartridge.on_policy_fraction)
        self._seed = config.data.seed
        self._choices: int = config.actor_rollout_ref.rollout.n
        self._skipped: int = config.actor_rollout_ref.actor.cartridge.skip_first_tokens
        self._async_steps: int = config.actor_rollout_ref.actor.cartridge.async_steps
        self.totals = TokenCounts()
        self._last: dict[str, float] = {}

    def identity(self, config: Any) -> dict[str, Any]:
        """What must be the same when a run goes on."""
        return {
            "actor.cartridge.on_policy_fraction": [list(point) for point in self.schedule.points],
            "actor.cartridge.teacher_temperature": (
                config.actor_rollout_ref.actor.cartridge.teacher_temperature
            ),
        }

    def plan(self, step: int, rows: int) -> list[bool]:
        """Whether the student writes, for each sample; the n samples of a prompt are neighbours."""
        samples = rows * self._choices
        return student_writes(self._seed, step, samples, self.schedule.at(step))

    def label(self, batch: TensorDict, step: int, epoch: int) -> None:
        """Puts the plan into a batch of prompts."""
        plan = torch.tensor(self.plan(step, len(batch)))
        batch[PLAN] = plan.view(len(batch), self._choices)
        tu.assign_non_tensor_data(batch, EPOCH, epoch)

    def check(
        self,
        tags: Sequence[dict[str, Any]],
        labels: Sequence[dict[str, Any]],
        step: int,
        version: int,
    ) -> None:
        """The batch that came back is the one that was planned.

        Args:
            tags: of the queue, one a sample.
            labels: ``extra_fields`` of the samples.
            step: the training step.
            version: of the cartridge that the student's samples must have been made with, or one of
                the ``async_steps`` before it.

        Raises:
            RolloutError: another number of samples is the student's than planned.
            OffPolicyError: a sample of the student's carries another version, or one of the
                teacher's carries any.
        """
        students = sum(self.plan(step, len(tags) // self._choices))
        authors = [str(label.get("author")) for label in labels]
        found = {author: authors.count(author) for author in set(authors)}
        planned = {STUDENT: students, TEACHER: len(tags) - students}
        if found != {author: count for author, count in planned.items() if count}:
            raise RolloutError(f"step {step}: planned {planned} samples, got {found}")
        for first_or_last in ("min_global_steps", "max_global_steps"):
            steps = [tag[first_or_last] for tag in tags]
            check_versions(authors, steps, version, self._async_steps)

    def count(self, tags: Sequence[dict[str, Any]], labels: Sequence[dict[str, Any]]) -> None:
        """Counts a batch that was trained on."""
        lengths = [int(tag["response_len"]) for tag in tags]
        by_teacher = [label["author"] == TEACHER for label in labels]
        hits = [bool(label.get("cached")) for label in labels]
        rows = list(zip(lengths, by_teacher, hits, strict=True))
        step = TokenCounts(
            generated=sum(length for length, teacher, _ in rows if not teacher),
            generated_by_teacher=sum(
                length for length, teacher, hit in rows if teacher and not hit
            ),
            teacher_scored=sum(lengths),
            trained=sum(max(0, length - self._skipped) for length in lengths),
        )
        self.totals += step
        self._last = {
            **step.metrics("tokens/"),
            **self.totals.metrics("tokens/total_"),
            "actor/on_policy_fraction": 1 - sum(by_teacher) / len(rows),
            "teacher_answers/cache_hits": sum(hits),
            "teacher_answers/cache_misses": sum(by_teacher) - sum(hits),
        }

    def metrics(self) -> dict[str, float]:
        """Of the last batch, and of the run up to it."""
        return dict(self._last)

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return asdict(self.totals)

    def restore(self, state: dict[str, int]) -> None:
        """Goes on counting where :meth:`state` stood."""
        self.totals = TokenCounts.from_saved(state)
