"""Student and teacher write a batch, in this process, as a server of a veRL run would.

The embedded server's engine draws with the seeds that veRL's agent loop would send, so that a run
draws the same answers whether it goes over HTTP or not. Floating-point sums of a differently
composed batch differ by about 1e-6; a draw that falls that near to the border between two tokens
can go the other way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from cartridge_distill.cartridge.kv_shape import text_config
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.data.general import BARE
from cartridge_distill.distill.mixing import STUDENT, TEACHER, answer_seed, rollout_seed
from cartridge_distill.distill.teacher import Teacher
from cartridge_distill.distill.teacher_answers import AnswerCache, TeacherWriter
from cartridge_distill.model.attention import ATTENTION_NAME
from cartridge_distill.model.identity import model_identity
from cartridge_distill.model.prompts import begin_of_text, render_document
from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.server.answering import end_token_ids
from cartridge_distill.server.engine import Engine
from cartridge_distill.server.rows import Row
from cartridge_distill.server.sampling import RequestSeeds
from cartridge_distill.server.settings import ServerSettings
from cartridge_distill.sync.versions import version_id
from cartridge_distill.util.errors import RolloutError
from training.study.settings import RunSettings


@dataclass(frozen=True)
class Prompt:
    """One row of the data, rendered.

    Attributes:
        index: of the row, which its seed follows from.
        ids: without a document.
        document_id: that the teacher reads; ``BARE`` for a general row.
    """

    index: int
    ids: list[int]
    document_id: str | None


@dataclass(frozen=True)
class Written:
    """One rollout, labelled: who wrote it, and with which version."""

    prompt: Prompt
    answer: Completion
    author: str
    step: int | None
    cached: bool = False


class Rollouts:
    """Writes the batches of one run.

    Args:
        model: the frozen base, from ``load_model``; its attention is taken over while it writes and
            given back afterwards.
        tokenizer: the model's.
        name: folder or hub id of the model, for the cache of the teacher's answers.
        teacher: has the documents and their KV.
        settings: of the run.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, teacher: Teacher, settings: RunSettings
    ) -> None:
        self._model, self._teacher, self._settings = model, teacher, settings
        self._ends = end_token_ids(getattr(model, "generation_config", None), tokenizer)
        self._server = ServerSettings()
        seed = settings.seed if settings.server_seed is None else settings.server_seed
        self._seeds = RequestSeeds(seed)
        cartridge = settings.cartridge
        cache, base_model = None, ""
        if cartridge.teacher_cache is not None:
            cache = AnswerCache(cartridge.teacher_cache)
            base_model = f"{model_identity(name, None)} fp32"
        temperature = cartridge.teacher_temperature
        self._writer = TeacherWriter(
            teacher.documents,
            teacher.render,
            context=text_config(model.config).max_position_embeddings,
            max_tokens=settings.response_tokens,
            temperature=settings.temperature if temperature is None else temperature,
            base_model=base_model,
            cache=cache,
            begin=begin_of_text(tokenizer),
        )

    def write(
        self, prompts: Sequence[Prompt], plan: Sequence[bool], epoch: int, step: int, prefix: Prefix
    ) -> list[Written]:
        """One answer to each prompt.

        Args:
            plan: whether the student writes, for each.
            epoch: how often the data was gone through before.
            step: optimizer steps that the cartridge has behind it.
            prefix: the cartridge, detached.

        Raises:
            RolloutError: an answer has no token.
            DocumentError: the teacher is to write, and the document does not fit the context.
        """
        written = asyncio.run(self._write(prompts, plan, epoch, step, prefix))
        for each in written:
            if not each.answer.token_ids:
                raise RolloutError(f"row {each.prompt.index} was answered with no token")
        return written

    async def _write(
        self, prompts: Sequence[Prompt], plan: Sequence[bool], epoch: int, step: int, prefix: Prefix
    ) -> list[Written]:
        rows: list[Row] = []

        async def student(prompt: Prompt) -> Written:
            seed = rollout_seed(self._settings.seed, prompt.index, epoch, 0)
            ids = [version_id("study", step)]  # of a version's id only the step counts
            row = self._row(prompt.ids, prompt.ids, ids, seed, self._settings.temperature, prefix)
            rows.append(row)
            return Written(prompt, await _of(row.future), STUDENT, step)

        async def teacher(prompt: Prompt) -> Written:
            read = self._read_before(prompt.document_id)

            async def ask(ids: list[int], temperature: float, seed: int) -> Completion:
                # The server computes the whole text; its beginning's KV is here already.
                known = 0 if read is None else read.num_tokens
                row = self._row(ids, ids[known:], [], seed, temperature, read)
                rows.append(row)
                return await _of(row.future)

            seed = answer_seed(self._settings.seed, prompt.index, epoch, 0)
            answer, cached = await self._writer.write(prompt.document_id, prompt.ids, seed, ask)
            return Written(prompt, answer, TEACHER, None, cached)

        tasks = [
            asyncio.create_task((student if by_student else teacher)(prompt))
            for prompt, by_student in zip(prompts, plan, strict=True)
        ]
        await asyncio.sleep(0)  # each has asked, or was answered from the cache, or failed
        if rows:
            self._compute(rows)
        return list(await asyncio.gather(*tasks))

    def _read_before(self, document_id: str | None) -> Prefix | None:
        if document_id is BARE:
            return self._teacher.bare_prefix()
        return self._teacher.prefix(document_id)

    def _row(
        self,
        drawn_by: Sequence[int],
        prompt_ids: Sequence[int],
        cartridge_ids: Sequence[str],
        seed: int,
        temperature: float,
        prefix: Prefix | None,
    ) -> Row:
        (generator,) = self._seeds.generators(drawn_by, cartridge_ids, 1, seed)
        return Row(
            prompt_ids=list(prompt_ids),
            max_new_tokens=self._settings.response_tokens,
            temperature=temperature,
            generator=generator,
            prefix=prefix,
            end_ids=self._ends,
        )

    def _compute(self, rows: Sequence[Row]) -> None:
        try:
            Engine(self._model, self._server).run(rows)
        finally:
            self._model.set_attn_implementation(ATTENTION_NAME)


async def _of(future: Future[Completion]) -> Completion:
    return await asyncio.wrap_future(future)


def rendered_teacher(model: Any, tokenizer: Any, documents: Any, settings: RunSettings) -> Teacher:
    """The teacher of a run, as veRL's engine makes it."""
    return Teacher(
        model,
        documents,
        partial(render_document, tokenizer),
        max_cached=settings.cartridge.teacher_cache_documents,
        backend=settings.cartridge.attention,
        begin=begin_of_text(tokenizer),
        prompt_mib=settings.cartridge.teacher_cache_prompt_mib,
    )
