"""The divergence to the teacher on text that the condition itself writes.

KL along the teacher's answers judges a cartridge on text that it would perhaps never write, and no
error of its own can compound there. Here each condition answers each question by itself, and the
teacher, with the whole document, is asked at each token of *that* text what it would have said:

* ``student_kl`` is ``sum_v p(v) log(p(v) / q(v))`` and ``student_reverse_kl`` is
  ``sum_v q(v) log(q(v) / p(v))`` with p the teacher's and q the condition's next-token
  distribution, at temperature 1 and over the whole vocabulary, in nats per token. The reverse KL on
  own text is what on-policy distillation lowers (Agarwal et al., arXiv 2306.13649; Gu et al.,
  arXiv 2306.08543).
* four texts a question: begun freely or with the question's stem, written greedily or at the
  temperature of the training's rollouts. A question without a stem has two.
* what the same logits tell besides: the overlap of the 20 likeliest tokens, its mass, the
  condition's entropy (``cartridge_distill.distill.overlap``); and of the text whether it is right,
  repeats itself and ends (``free_answers``).

The full document is the teacher itself: its divergences are zero, its texts are written and read
like all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.data.records import Question
from cartridge_distill.distill.loss import TeacherTopK
from cartridge_distill.distill.overlap import Overlap
from cartridge_distill.evaluation.answers import Sampling, check_context
from cartridge_distill.evaluation.conditions import Condition, View
from cartridge_distill.evaluation.data import Numbered, in_chunks
from cartridge_distill.evaluation.free_answers import matches_any, repeated_ngrams
from cartridge_distill.evaluation.harness import Progress, by_view
from cartridge_distill.evaluation.journal import Journal, own_text_key
from cartridge_distill.evaluation.measure_rows import (
    FREE,
    GREEDY,
    SAMPLED,
    STARTED,
    OwnText,
    own_text_index,
)
from cartridge_distill.evaluation.names import FULL_DOCUMENT
from cartridge_distill.evaluation.prompts import end_ids, started_prompt
from cartridge_distill.evaluation.scoring import finite, response_logits, sampled_answers

TOP = 20
"""Of how many likeliest tokens the overlap is taken."""

SCORED_AT_ONCE = 512
"""Tokens whose logits are held at once, at least one text: x 128k vocabulary x 4 bytes = 262 MB,
of the teacher and of the condition, and about as much again twice while they are compared."""

_DIGITS = 6  # of a token's nats, in the files


@dataclass(frozen=True)
class Divergences:
    """Of one text, token by token; see the module."""

    kl: list[float]
    reverse_kl: list[float]
    overlap: float
    overlap_mass: float
    entropy: float

    @classmethod
    @torch.no_grad()
    def of(cls, teacher: Tensor, condition: Tensor) -> Divergences:
        """Of ``[n, V]`` logits at the n tokens of a text."""
        p, q = (logits.float().log_softmax(-1) for logits in (teacher, condition))
        told = TeacherTopK.from_logits(teacher, TOP)
        both = Overlap.of(condition, told)
        for values in (p, q):
            finite(float(values.amax()))
        return cls(
            _nats(_kl(p, q)),
            _nats(_kl(q, p)),
            float(both.share.sum()),
            float(both.mass.sum()),
            float(both.entropy.sum()),
        )


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """``[n]`` of ``[n, V]`` log-probs; a token that p rules out counts nothing."""
    return torch.where(torch.isneginf(p), 0.0, p.exp() * (p - q)).sum(-1)


def _nats(values: Tensor) -> list[float]:
    # Rounding of two equal distributions can end below zero.
    return [round(max(0.0, finite(value)), _DIGITS) for value in values.tolist()]


@dataclass(frozen=True)
class _Due:
    """A text that is to be written."""

    asked: Numbered[Question]
    start: str
    sampling: str

    @property
    def index(self) -> int:
        return own_text_index(self.asked.index, self.start, self.sampling)


class OwnTexts:
    """Has every condition write to every question, and scores what it wrote.

    Args:
        model, tokenizer, conditions: as for ``harness.Evaluation``.
        document: what the teacher has read.
        sampling: temperature, length and seed of the texts; greedy ones have the same length.
        chunk: questions written to at once, twice each. A step of writing reads all weights
            whatever the number of texts, so that more at once cost little more.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        document: Condition,
        conditions: Sequence[Condition],
        questions: Sequence[Question],
        sampling: Sampling,
        chunk: int = 16,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._document, self._conditions = document, list(conditions)
        self._questions, self._sampling, self._chunk = list(questions), sampling, chunk
        self._ends = end_ids(model, tokenizer)

    @property
    def texts(self) -> int:
        """How many are written in all."""
        stems = sum(question.stem is not None for question in self._questions)
        return len(self._conditions) * (2 * len(self._questions) + 2 * stems)

    def run(self, journal: Journal, progress: Progress | None = None) -> None:
        """Puts into the journal what is not in it.

        Raises:
            ConfigError: what was read, question and text are over the model's context.
            CartridgeDistillError: the logits behind a prefix are not finite.
        """
        done, total = 0, self.texts
        for chunk in in_chunks(self._questions, self._chunk):
            for condition in self._conditions:
                for start in (FREE, STARTED):
                    due = [
                        _Due(each, start, sampling)
                        for each in chunk
                        for sampling in (GREEDY, SAMPLED)
                        if start == FREE or each.item.stem
                    ]
                    missing = [
                        text
                        for text in due
                        if own_text_key(condition.name, text.index) not in journal
                    ]
                    if missing:
                        journal.add(self._rows(condition, missing))
                    done += len(due)
                    if due and progress is not None:
                        progress(done, total)

    def greedy(self, condition: Condition) -> list[OwnText]:
        """What it writes freely and greedily to each question, scored; nothing is drawn at random.

        Raises: as :meth:`run`.
        """
        rows: list[OwnText] = []
        for chunk in in_chunks(self._questions, self._chunk):
            rows += self._rows(condition, [_Due(asked, FREE, GREEDY) for asked in chunk])
        return rows

    def _rows(self, condition: Condition, due: list[_Due]) -> list[OwnText]:
        questions = [text.asked.item for text in due]
        prompts = [self._prompt(text) for text in due]
        document = self._document.view(questions[0].document_id, questions[0].question)
        views = [condition.view(each.document_id, each.question) for each in questions]
        for view in {id(view): view for view in (*views, document)}.values():
            check_context(
                self._model, view, prompts, self._sampling.max_new_tokens, "--measure-tokens"
            )
        temperatures = [self._temperature(text) for text in due]
        written = sampled_answers(
            self._model,
            [view.prefix for view in views],
            prompts,
            self._sampling.max_new_tokens,
            temperatures,
            [self._sampling.generator(prompt) for prompt in prompts],
            self._ends,
        )
        scored: dict[int, Divergences] = {}
        for view, group in by_view(views, range(len(views))):
            scored.update(self._scored(condition, view, document, group, prompts, written))
        return [
            self._row(condition.name, *text, scored[place])
            for place, text in enumerate(zip(due, views, temperatures, written, strict=True))
        ]

    def _row(
        self,
        condition: str,
        due: _Due,
        view: View,
        temperature: float,
        ids: list[int],
        found: Divergences,
    ) -> OwnText:
        question = due.asked.item
        text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
        repeated, ngrams = repeated_ngrams(ids)
        return OwnText(
            condition=condition,
            document_id=question.document_id,
            question_index=due.asked.index,
            start=due.start,
            sampling=due.sampling,
            temperature=temperature,
            seed=self._sampling.seed,
            text=text,
            ended=ids[-1] in self._ends,
            kl=found.kl,
            reverse_kl=found.reverse_kl,
            overlap=found.overlap,
            overlap_mass=found.overlap_mass,
            entropy=found.entropy,
            repeated=repeated,
            ngrams=ngrams,
            matched=matches_any(text, question.wordings),
            kv_tokens=view.kv_tokens,
        )

    def _temperature(self, due: _Due) -> float:
        return 0.0 if due.sampling == GREEDY else self._sampling.temperature

    def _prompt(self, due: _Due) -> list[int]:
        question = due.asked.item
        # Free, the answer has begun as well, with nothing: a template may open a thought for it.
        begun = question.stem or "" if due.start == STARTED else ""
        return started_prompt(self._tokenizer, question.question, begun)

    @torch.no_grad()
    def _scored(
        self,
        condition: Condition,
        view: View,
        document: View,
        group: Sequence[int],
        prompts: Sequence[list[int]],
        texts: Sequence[list[int]],
    ) -> Iterator[tuple[int, Divergences]]:
        """(place, what it comes to) of texts behind one prefix, a few of them at a time."""
        for members in few_tokens(group, lambda place: len(texts[place])):
            asked, said = [prompts[i] for i in members], [texts[i] for i in members]

            def logits(
                prefix: Prefix | None, asked: list[list[int]] = asked, said: list[list[int]] = said
            ) -> Sequence[Tensor]:
                found = response_logits(self._model, prefix, asked, said)
                return found.split([len(ids) for ids in said])

            teacher = logits(document.prefix)
            own = teacher if condition.name == FULL_DOCUMENT else logits(view.prefix)
            for place, theirs, mine in zip(members, teacher, own, strict=True):
                yield place, Divergences.of(theirs, mine)


def few_tokens(places: Sequence[int], tokens: Callable[[int], int]) -> Iterator[list[int]]:
    """Places in order, cut so that each part has :data:`SCORED_AT_ONCE` tokens or is one text."""
    part: list[int] = []
    held = 0
    for place in places:
        if part and held + tokens(place) > SCORED_AT_ONCE:
            yield part
            part, held = [], 0
        part.append(place)
        held += tokens(place)
    if part:
        yield part
