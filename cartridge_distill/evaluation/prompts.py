"""Evaluation questions as token ids: what the model is asked, and the options it is scored on.

Two forms. *Started*, for scores by likelihood: the assistant's turn begins with the question's stem
("Her pet is a") and each option completes it; without a stem the option is the whole answer.
*Lettered*, for generated answers: see ``answers``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cartridge_distill.data.records import Question
from cartridge_distill.model.prompts import render_prompt
from cartridge_distill.util.errors import ConfigError


@dataclass(frozen=True)
class AskedQuestion:
    """A question in token ids.

    Attributes:
        question: the question.
        prompt: ids after which the teacher's answer, which the KL is taken on, begins.
        stem: ids that all options continue; a beginning of ``prompt``, mostly all of it.
        options: ids of each option behind ``stem``.
    """

    question: Question
    prompt: list[int]
    stem: list[int]
    options: list[list[int]]

    @classmethod
    def of(cls, tokenizer: Any, question: Question) -> AskedQuestion:
        """Raises ConfigError when an option cannot be told from the stem."""
        stem, options = _options(tokenizer, question)
        # Without a stem too the answer has begun: a template may open a thought for the model.
        prompt = started_prompt(tokenizer, question.question, question.stem or "")
        return cls(question, prompt, stem, options)


def started_prompt(tokenizer: Any, question: str, started: str | None = None) -> list[int]:
    """Ids of a user's turn and an open assistant's turn, which may have begun."""
    messages = [{"role": "user", "content": question}]
    if started is not None:
        messages.append({"role": "assistant", "content": started})
    return render_prompt(tokenizer, messages)


def _options(tokenizer: Any, question: Question) -> tuple[list[int], list[list[int]]]:
    """Ids of the prompt that all options continue, and the ids of each continuation.

    The prompt is what all of them have in common, so that a tokenizer that joins the stem's last
    letters with an option's first ones is scored on real tokens too.
    """
    asked = question.question
    start = f"{question.stem} " if question.stem else ""
    whole = [started_prompt(tokenizer, asked, start + text) for text in question.options]
    common = len(started_prompt(tokenizer, asked, question.stem or ""))
    while common > 0 and any(ids[:common] != whole[0][:common] for ids in whole):
        common -= 1
    options = [ids[common:] for ids in whole]
    if common == 0 or not all(options):
        raise ConfigError(
            f"The options of {question.question!r} cannot be scored: one of them adds no token to "
            "the stem; fix: give every option a text of its own"
        )
    return whole[0][:common], options


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: the tokenizer's, and the model's generation config's."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = found if isinstance(found, list) else [found]
    return frozenset(end for end in (*listed, tokenizer.eos_token_id) if end is not None)
