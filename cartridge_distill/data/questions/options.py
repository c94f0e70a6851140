"""Answers to choose from, for a question that came with the right one alone.

Wrong answers are the right ones to other questions about the same document: they are of its world,
and a model that knows which words belong to the document, but not which belong together, chooses
among them by chance. Those most like the right answer are taken: a number among numbers, a phrase
of three words among others of its length. Accuracy on such options says less than on options that
a person wrote; log-loss and KL do not depend on them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from cartridge_distill.data.records import Question
from cartridge_distill.data.words import normalised, words
from cartridge_distill.util.errors import ConfigError, with_fix

MOST_WRONG = 4
"""With the right one five options, as LongHealth's questions have."""


@dataclass(frozen=True)
class Asked:
    """A question with its right answer.

    Attributes:
        where: names it in messages.
        document_id: the document that answers it.
        wrong: answers that are wrong; none to have them chosen.
        stem: beginning of an answer sentence that each answer completes, or None.
        also: other wordings of the right answer.
        kind: of question, or None.
    """

    where: str
    document_id: str
    question: str
    answer: str
    wrong: tuple[str, ...] = ()
    stem: str | None = None
    also: tuple[str, ...] = ()
    kind: str | None = None


def with_options(asked: Sequence[Asked], seed: int) -> list[Question]:
    """Multiple-choice questions of one document; the right answer's place is drawn.

    Raises:
        ConfigError: a question has no wrong answers and there are no others to take them from, or
            one of its answers stands there twice.
    """
    return [_with_options(one, asked, seed) for one in asked]


def _with_options(one: Asked, asked: Sequence[Asked], seed: int) -> Question:
    wrong = one.wrong or _answers_of_others(one, asked)
    if not wrong:
        raise ConfigError(
            f"{one.where}: there is nothing to choose from but the right answer {one.answer!r}; "
            "fix: give 'wrong' answers, or more questions about the same document"
        )
    options = [one.answer, *wrong]
    random.Random(f"{seed}/{one.document_id}/{one.question}").shuffle(options)
    try:
        right = options.index(one.answer)
        return Question(
            *(one.document_id, one.question, tuple(options), right),
            *(one.stem, one.also, one.kind),
        )
    except ConfigError as error:
        raise ConfigError(with_fix(f"{one.where}: {error}", "change one of them")) from None


def _answers_of_others(one: Asked, asked: Sequence[Asked]) -> list[str]:
    """The most alike in kind, each text once; none that holds the right answer, or lies in it."""
    right = [normalised(text) for text in (one.answer, *one.also)]
    found: dict[str, str] = {}
    for other in asked:
        text = normalised(other.answer)
        if not any(text in wording or wording in text for wording in right):
            found.setdefault(text, other.answer)

    def unlike(answer: str) -> tuple[bool, int, str]:
        digits = _has_digit(answer) != _has_digit(one.answer)
        return digits, abs(len(words(answer)) - len(words(one.answer))), answer

    return sorted(found.values(), key=unlike)[:MOST_WRONG]


def _has_digit(text: str) -> bool:
    return any(character.isdigit() for character in text)
