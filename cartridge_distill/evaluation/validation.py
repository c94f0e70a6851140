"""Held-out questions, scored again and again while a prefix is being trained.

The same scores as the evaluation's, without intervals. What the teacher says does not change while
the base model is frozen: its answers and its distributions over them are computed at the first call
and kept in main memory, answer tokens x vocabulary x 4 bytes a question (30 questions of 12 tokens
and a vocabulary of 49,152: 71 MB; `kept_bytes`). The documents' KV is not kept.

With ``own_text_tokens`` the prefix also writes an answer of its own to each question, greedily, and
is scored on that (``own_text``): the scores above are all along text that somebody else wrote.

Nothing here draws a random number, has a gradient or changes the model, so that a run trains the
same with and without it. With several ranks every rank scores every question: all run the sharded
model equally often, and all know the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.data.records import Question
from cartridge_distill.distill.teacher import Teacher
from cartridge_distill.evaluation.answers import Sampling, check_lengths
from cartridge_distill.evaluation.conditions import Fixed, FullDocument
from cartridge_distill.evaluation.data import check_documents, in_chunks
from cartridge_distill.evaluation.measures import SCORES, MeasureRows, measured
from cartridge_distill.evaluation.names import ANSWER_TOKENS, TRAINED
from cartridge_distill.evaluation.own_text import OwnTexts
from cartridge_distill.evaluation.prompts import AskedQuestion, end_ids, started_prompt
from cartridge_distill.evaluation.scoring import (
    TeacherAnswers,
    best,
    device_of,
    kl_sums,
    option_scores,
)
from cartridge_distill.model.prefill import prefix_from_tokens
from cartridge_distill.util.errors import ConfigError


class Validation:
    """Scores a prefix on questions.

    Args:
        tokenizer: of the teacher's model.
        questions: with the ids of their documents.
        teacher: has the model and the documents; its kept KV is not touched.
        chunk: questions at once.
        own_text_tokens: of the prefix's own answers, at most; 0 for none.

    Raises:
        ConfigError: no questions, or options that cannot be told apart.
        DocumentError: a question's document is missing or too long for the model.
    """

    def __init__(
        self,
        tokenizer: Any,
        questions: Sequence[Question],
        teacher: Teacher,
        chunk: int = 8,
        own_text_tokens: int = 0,
    ) -> None:
        if not questions:
            raise ConfigError(
                "there are no questions to validate on; fix: prepare the data with --questions"
            )
        check_documents(questions, teacher.documents)
        self._model, self._ends = teacher.model, end_ids(teacher.model, tokenizer)
        self._chunks = [
            [AskedQuestion.of(tokenizer, number.item) for number in numbered]
            for numbered in in_chunks(questions, chunk)
        ]
        self._document_ids = {
            document_id: teacher.document_ids(document_id)
            for document_id in dict.fromkeys(question.document_id for question in questions)
        }
        self._told: list[TeacherAnswers] = []
        self._own_texts: OwnTexts | None = None
        self._document = FullDocument(teacher, apart=True)
        if own_text_tokens:
            for asked in chain.from_iterable(self._chunks):
                read = len(self._document_ids[asked.question.document_id])
                check_lengths(
                    teacher.model,
                    read,
                    [started_prompt(tokenizer, asked.question.question, "")],
                    own_text_tokens,
                    "lower actor.cartridge.eval_own_text_tokens",
                )
            sampling = Sampling(temperature=0.0, max_new_tokens=own_text_tokens)
            self._own_texts = OwnTexts(
                teacher.model, tokenizer, self._document, [], questions, sampling
            )
        self.questions = len(questions)

    @property
    def kept_bytes(self) -> int:
        """Main memory that the teacher's distributions take; 0 before the first call."""
        return sum(told.num_bytes for told in self._told)

    @torch.no_grad()
    def run(self, prefix: Prefix | None) -> dict[str, float]:
        """``kl`` (nats per token), ``log_loss`` (nats per token), ``accuracy`` (0 to 1).

        With own texts, the scores of ``measures.SCORES`` that these have besides.

        Raises:
            CartridgeDistillError: the logits behind the prefix are not finite.
        """
        if not self._told:
            self._told = self._ask_teacher()
        kl, tokens, loss, right = 0.0, 0, 0.0, 0
        for asked, kept in zip(self._chunks, self._told, strict=True):
            told = kept.to(device_of(self._model))
            kl += sum(kl_sums(self._model, prefix, told))
            tokens += sum(len(answer) for answer in told.answers)
            scores = option_scores(self._model, prefix, asked)
            for question, found in zip(asked, scores, strict=True):
                correct = question.question.correct
                loss -= found[correct]
                right += best(found) == correct
        count = self.questions
        measured = {"kl": kl / tokens, "log_loss": loss / count, "accuracy": right / count}
        return {**measured, **self._on_own_texts(prefix)}

    def _on_own_texts(self, prefix: Prefix | None) -> dict[str, float]:
        if self._own_texts is None:
            return {}
        try:
            rows = MeasureRows(self._own_texts.greedy(Fixed(TRAINED, prefix)))
        finally:
            self._document.forget()  # the trainer needs the memory
        ratios = {name: SCORES[name](rows) for name in measured(rows)}
        return {
            name: sum(ratio.values) / sum(ratio.weights)
            for name, ratio in ratios.items()
            if ratio is not None  # None: no text reached these positions
        }

    def _ask_teacher(self) -> list[TeacherAnswers]:
        told, read, document = [], None, None
        for asked in self._chunks:
            document_id = asked[0].question.document_id
            if document is None or read != document_id:
                ids = torch.tensor(self._document_ids[document_id], device=device_of(self._model))
                read, document = document_id, prefix_from_tokens(self._model, ids)
            prompts = [question.prompt for question in asked]
            answers = TeacherAnswers.of(self._model, document, prompts, ANSWER_TOKENS, self._ends)
            told.append(answers.to("cpu"))
        return told
