"""Batches that student and teacher write together: the plan, the labels, the check, the counts.

The trainer plans each batch before it is sent out and checks the labels that come back; the agent
loop asks the one or the other. See ``cartridge_distill.distill.mixing`` and
``cartridge_distill.distill.teacher_answers``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from cartridge_distill.cartridge.kv_shape import text_config
from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.data.general import document_of
from cartridge_distill.distill.mixing import (
    STUDENT,
    TEACHER,
    Schedule,
    TokenCounts,
    answer_seed,
    student_writes,
)
from cartridge_distill.distill.on_policy import check_versions
from cartridge_distill.distill.teacher_answers import AnswerCache, TeacherWriter
from cartridge_distill.model.identity import model_identity
from cartridge_distill.model.prompts import begin_of_text, render_document
from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.util.errors import RolloutError

PLAN, EPOCH = "student_writes", "epoch"
"""Columns of a batch on its way out: ``[B, n]`` bool, and how often the data was gone through."""


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
            version: of the cartridge that the student's samples must have been made with.

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
            check_versions(authors, [tag[first_or_last] for tag in tags], version)

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


class TeacherAnswers:
    """The agent loop's side: made once a worker, asked for each sample.

    Args:
        config: veRL's whole configuration.
        model_config: veRL's ``HFModelConfig``, with the tokenizer.

    Raises:
        DocumentError: the documents file cannot be read.
        ConfigError: answers are to be kept for a model that cannot be told from others.
    """

    def __init__(self, config: Any, model_config: Any) -> None:
        settings = config.actor_rollout_ref.actor.cartridge
        rollout = config.actor_rollout_ref.rollout
        self._document_key: str = settings.document_key
        self._seed = config.data.seed
        temperature = settings.teacher_temperature
        if temperature is None:
            temperature = rollout.temperature
        cache, base_model = None, ""
        if settings.teacher_cache is not None:
            cache = AnswerCache(settings.teacher_cache)
            commit = getattr(model_config.hf_config, "_commit_hash", None)
            # What the trainer computes in: the server does as well, or their log-probs differ.
            dtype = config.actor_rollout_ref.actor.fsdp_config.model_dtype
            base_model = f"{model_identity(model_config.local_path, commit)} {dtype}"
        self._writer = TeacherWriter(
            DocumentStore.from_file(settings.documents),
            partial(render_document, model_config.tokenizer),
            context=text_config(model_config.hf_config).max_position_embeddings,
            max_tokens=rollout.response_length,
            temperature=temperature,
            base_model=base_model,
            cache=cache,
            begin=begin_of_text(model_config.tokenizer),
        )

    async def write(
        self, server: Any, prompt_ids: list[int], sample: dict[str, Any], request_id: str
    ) -> tuple[Completion, dict[str, Any]]:
        """The teacher's answer and its ``extra_fields``.

        Args:
            server: veRL's client of the rollout servers.
            prompt_ids: without the document.
            sample: the columns of the sample's row.
            request_id: of the request, should there be one.

        Raises:
            DocumentError: the sample has no document, or it does not fit the context.
        """

        async def ask(ids: list[int], temperature: float, seed: int) -> Completion:
            output = await server.generate(
                request_id=request_id,
                prompt_ids=ids,
                sampling_params={"author": TEACHER, "temperature": temperature, "seed": seed},
            )
            reason = output.extra_fields["finish_reason"]
            return Completion(output.token_ids, output.log_probs, reason)

        row = int(sample["index"])
        document_id = document_of(sample.get("extra_info"), self._document_key, f"row {row}")
        seed = answer_seed(self._seed, row, int(sample[EPOCH]), int(sample["session_id"]))
        answer, cached = await self._writer.write(document_id, prompt_ids, seed, ask)
        labels = {"author": TEACHER, "cached": cached, "finish_reason": answer.finish_reason}
        return answer, labels


def teacher_answers(config: Any, model_config: Any) -> TeacherAnswers | None:
    """Where the teacher ever writes; None where only the student does."""
    fraction = config.actor_rollout_ref.actor.cartridge.on_policy_fraction
    return TeacherAnswers(config, model_config) if Schedule.of(fraction).needs_teacher else None
