"""The evaluation itself: questions and prompts under every condition, a few at a time.

Questions of one document run together, in chunks; the teacher's answers of a chunk are computed
once for all conditions. Each condition's rows of a chunk go to the journal as soon as they are
there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cartridge_distill.data.records import Question
from cartridge_distill.evaluation.answers import READINGS, Answerer, Reading, lettered_prompt
from cartridge_distill.evaluation.conditions import Condition, FullDocument, View
from cartridge_distill.evaluation.data import HeldOutPrompt, Numbered, in_chunks
from cartridge_distill.evaluation.journal import Journal, prompt_key, question_key
from cartridge_distill.evaluation.names import ANSWER_TOKENS, FULL_DOCUMENT, NAMED
from cartridge_distill.evaluation.prompts import AskedQuestion, end_ids
from cartridge_distill.evaluation.results import PromptResult, QuestionResult
from cartridge_distill.evaluation.scoring import (
    TeacherAnswers,
    best,
    kl_sums,
    option_scores,
)
from cartridge_distill.util.errors import ConfigError

Progress = Callable[[int, int], None]


class Evaluation:
    """Scores conditions against the model with the whole document.

    Args:
        model: from ``load_model``; the teacher and every condition run it.
        tokenizer: its tokenizer.
        document: the condition "full document", which is the teacher.
        conditions: what to compare, in the table's order.
        answerer: generates answers; None for none.
        read_answer: which option an answer means, one of ``answers.READINGS``.
        seed: stands in the rows.
        answer_tokens: how long the teacher's answers are at most.
        chunk: questions at once; 8 x 60 tokens of options x 128k vocabulary x 4 bytes = 250 MB.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        document: FullDocument,
        conditions: Sequence[Condition],
        *,
        answerer: Answerer | None = None,
        read_answer: Reading = READINGS[NAMED],
        seed: int = 0,
        answer_tokens: int = ANSWER_TOKENS,
        chunk: int = 8,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._document, self._conditions = document, list(conditions)
        self._answerer, self._seed = answerer, seed
        self._read_answer = read_answer
        self._answer_tokens, self._chunk = answer_tokens, chunk
        self._ends = end_ids(model, tokenizer)

    def run(
        self,
        questions: Sequence[Question],
        prompts: Sequence[HeldOutPrompt],
        journal: Journal,
        progress: Progress | None = None,
    ) -> None:
        """Puts into the journal what is not in it.

        Args:
            progress: called with (done, total) rows, those of the journal among them.

        Raises:
            ConfigError: nothing to evaluate, or options that cannot be told apart.
            DocumentError: a question's document is missing or too long.
        """
        if not questions and not prompts:
            raise ConfigError(
                "There are no evaluation questions, and no held-out prompts; fix: write some with "
                "`cartridge-distill prepare`"
            )
        total = len(self._conditions) * (len(questions) + len(prompts))
        done = sum(question_key(*k) in journal for k in self._keys(len(questions)))
        done += sum(prompt_key(*k) in journal for k in self._keys(len(prompts)))

        def advance(rows: int) -> None:
            nonlocal done
            for _ in range(rows):
                done += 1
                if progress is not None:
                    progress(done, total)

        for chunk in in_chunks(questions, self._chunk):
            for question_rows in self._question_rows(chunk, journal):
                journal.add(question_rows)
                advance(len(question_rows))
        for prompt_chunk in in_chunks(prompts, self._chunk):
            for prompt_rows in self._prompt_rows(prompt_chunk, journal):
                journal.add(prompt_rows)
                advance(len(prompt_rows))

    def _keys(self, count: int) -> Iterator[tuple[str, int]]:
        return ((c.name, index) for c in self._conditions for index in range(count))

    def _question_rows(
        self, chunk: list[Numbered[Question]], journal: Journal
    ) -> Iterator[list[QuestionResult]]:
        """The rows of one condition after the other that are missing."""
        missing = {
            condition.name: [
                place
                for place, number in enumerate(chunk)
                if question_key(condition.name, number.index) not in journal
            ]
            for condition in self._conditions
        }
        if not any(missing.values()):
            return
        asked = [AskedQuestion.of(self._tokenizer, number.item) for number in chunk]
        document_id = chunk[0].item.document_id
        teacher = self._teacher_answers(document_id, [question.prompt for question in asked])
        for condition in self._conditions:
            places = missing[condition.name]
            if not places:
                continue
            views = [condition.view(document_id, chunk[i].item.question) for i in places]
            scored: dict[int, tuple[float, list[float]]] = {}
            for view, group in by_view(views, places):
                kls = self._kls(condition.name, view, teacher.take(group))
                scores = option_scores(self._model, view.prefix, [asked[i] for i in group])
                scored.update(zip(group, zip(kls, scores, strict=True), strict=True))
            texts = self._generated(condition.name, views, [asked[i].question for i in places])
            yield [
                self._question_row(
                    condition.name, chunk[i], view, *scored[i], len(teacher.answers[i]), text
                )
                for i, view, text in zip(places, views, texts, strict=True)
            ]

    def _question_row(
        self,
        condition: str,
        asked: Numbered[Question],
        view: View,
        kl_sum: float,
        scores: list[float],
        kl_tokens: int,
        text: str | None,
    ) -> QuestionResult:
        question = asked.item
        choice = best(scores)
        generated = None if text is None else self._read_answer(text, question.options)
        return QuestionResult(
            condition=condition,
            document_id=question.document_id,
            question_index=asked.index,
            question=question.question,
            right_answer=question.answer,
            seed=self._seed,
            kl_sum=kl_sum,
            kl_tokens=kl_tokens,
            log_loss=-scores[question.correct],
            likelihood_choice=choice,
            likelihood_correct=choice == question.correct,
            generated_text=text,
            generated_choice=generated,
            generated_correct=None if text is None else generated == question.correct,
            kv_tokens=view.kv_tokens,
        )

    def _prompt_rows(
        self, chunk: list[Numbered[HeldOutPrompt]], journal: Journal
    ) -> Iterator[list[PromptResult]]:
        teacher: TeacherAnswers | None = None
        document_id = chunk[0].item.document_id
        for condition in self._conditions:
            places = [
                place
                for place, number in enumerate(chunk)
                if prompt_key(condition.name, number.index) not in journal
            ]
            if not places:
                continue
            if teacher is None:
                ids = [number.item.ids for number in chunk]
                teacher = self._teacher_answers(document_id, ids)
            views = [condition.view(document_id, chunk[i].item.asked) for i in places]
            sums: dict[int, float] = {}
            for view, group in by_view(views, places):
                kls = self._kls(condition.name, view, teacher.take(group))
                sums.update(zip(group, kls, strict=True))
            yield [
                PromptResult(
                    condition=condition.name,
                    document_id=document_id,
                    prompt_index=chunk[i].index,
                    prompt=chunk[i].item.text,
                    seed=self._seed,
                    kl_sum=sums[i],
                    kl_tokens=len(teacher.answers[i]),
                    kv_tokens=view.kv_tokens,
                )
                for i, view in zip(places, views, strict=True)
            ]

    def _teacher_answers(self, document_id: str, prompts: Sequence[list[int]]) -> TeacherAnswers:
        view = self._document.view(document_id)
        assert view.prefix is not None
        return TeacherAnswers.of(self._model, view.prefix, prompts, self._answer_tokens, self._ends)

    def _kls(self, condition: str, view: View, teacher: TeacherAnswers) -> list[float]:
        if condition == FULL_DOCUMENT:  # the teacher itself
            return [0.0] * len(teacher.prompts)
        return kl_sums(self._model, view.prefix, teacher)

    def _generated(
        self, condition: str, views: Sequence[View], questions: Sequence[Question]
    ) -> Sequence[str | None]:
        if self._answerer is None:
            return [None] * len(questions)
        prompts = [lettered_prompt(self._tokenizer, question) for question in questions]
        return self._answerer.answer(condition, views, prompts)


def by_view(views: Sequence[View], places: Iterable[int]) -> Iterator[tuple[View, list[int]]]:
    """Places with one and the same prefix together."""
    groups: dict[int, tuple[View, list[int]]] = {}
    for view, place in zip(views, places, strict=True):
        groups.setdefault(id(view), (view, []))[1].append(place)
    yield from groups.values()
