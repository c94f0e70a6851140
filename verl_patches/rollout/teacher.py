"""The teacher in rollouts: the agent loop asks it where the trainer planned so.

It writes through the student's own server, with the document before the prompt and without a
cartridge. See ``cartridge_distill.distill.teacher_answers``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from cartridge_distill.cartridge.kv_shape import text_config
from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.data.general import document_of
from cartridge_distill.distill.mixing import TEACHER, Schedule, answer_seed
from cartridge_distill.distill.teacher_answers import AnswerCache, TeacherWriter
from cartridge_distill.model.identity import model_identity
from cartridge_distill.model.prompts import begin_of_text, render_document
from cartridge_distill.rollout.fingerprint import Completion

PLAN, EPOCH = "student_writes", "epoch"
"""Columns of a batch on its way out: ``[B, n]`` bool, and how often the data was gone through."""


class RolloutTeacher:
    """The teacher in rollouts: made once a worker, asked for each sample that it is to write.

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


def rollout_teacher(config: Any, model_config: Any) -> RolloutTeacher | None:
    """Where the teacher ever writes; None where only the student does."""
    fraction = config.actor_rollout_ref.actor.cartridge.on_policy_fraction
    return RolloutTeacher(config, model_config) if Schedule.of(fraction).needs_teacher else None
