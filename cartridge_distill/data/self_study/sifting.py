"""What is kept of the generations, and why the rest is not.

Dropped, in this order, each counted: cut off at the token limit; no three words; words or letters
that repeat; a copy of the seed prompt or of the document; longer than a prompt may be; an
evaluation question, or near to one; a prompt seen before, or nearly (decontamination.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from cartridge_distill.data.decontamination import Guard, Seen, jaccard
from cartridge_distill.data.self_study.plan import Plan, StudyChunk
from cartridge_distill.data.words import normalised, words
from cartridge_distill.model.prompts import render_prompt

_FEWEST_WORDS = 3
_COMMONEST_LETTER = 0.5  # of all letters and signs; more is repetition
_DISTINCT_WORDS, _ENOUGH_TO_TELL = 0.4, 8  # less is repetition; in so many words
_ECHO = 0.6  # similarity to the seed prompt

_LABEL = re.compile(r"(?:question|task|request|prompt|instruction)s?\s*\d*\s*[:.]\s+", re.I)
_QUOTES = {'"': '"', "'": "'", "“": "”", "«": "»", "`": "`"}


@dataclass(frozen=True)
class Written:
    """A prompt that is kept: the cleaned text and the journal's row it is from."""

    text: str
    row: dict[str, Any]


@dataclass
class Sifted:
    """Prompts kept, in the order of their tasks, and how many were dropped for which reason."""

    kept: list[Written] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def clean(text: str, opening: str = "") -> str:
    """Without a line of introduction, a label such as `Question:`, and quotes around all of it.

    A text whose opening was given has no introduction.
    """
    text = text.strip()
    first, _, rest = text.partition("\n")
    if not opening and rest.strip() and first.rstrip().endswith(":") and len(first.split()) <= 12:
        text = rest.strip()
    text = text.replace("**", "")
    text = text[label.end() :] if (label := _LABEL.match(text)) else text
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1]
    return text.strip()


def sift(
    rows: Iterable[dict[str, Any]],
    plan: Plan,
    guard: Guard,
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokens: int,
) -> Sifted:
    """Decides about each generation; the rules stand at the top of this module.

    Args:
        rows: of the journal, in any order.
        plan: that they were made by.
        guard: knows the evaluation questions.
        tokenizer, prompt_tokens: how long a prompt may be.
    """
    found = Sifted()
    seen = {chunk.source.document_id: Seen() for chunk in plan.chunks}
    for row in sorted(rows, key=lambda row: row["task"]):
        chunk = plan.task(row["task"]).chunk
        text = clean(row["text"], row["opening"])
        before = seen[chunk.source.document_id]
        tokens = len(render_prompt(tokenizer, [{"role": "user", "content": text}]))
        too_long = f"longer than {prompt_tokens} tokens" if tokens > prompt_tokens else None
        reason = _fault(text, row, chunk) or too_long or _met_before(text, guard, before)
        if reason:
            found.dropped[reason] += 1
            continue
        before.add(text)
        found.kept.append(Written(text, row))
    return found


def _fault(text: str, row: dict[str, Any], chunk: StudyChunk) -> str | None:
    """What is wrong with a generation by itself, if anything."""
    if row["finish"] != "stop":
        return "cut off at the token limit"
    said = words(text)
    if len(said) < _FEWEST_WORDS:
        return f"empty or fewer than {_FEWEST_WORDS} words"
    letters = Counter("".join(text.split()))
    repeats = max(letters.values()) > _COMMONEST_LETTER * letters.total()
    if repeats or len(said) >= _ENOUGH_TO_TELL and len(set(said)) < _DISTINCT_WORDS * len(said):
        return "repeats itself"
    inside = normalised(text)
    if inside in normalised(row["seed_prompt"]) or inside in normalised(chunk.text):
        return "copies the seed prompt or the document"
    if jaccard(set(said), set(words(row["seed_prompt"]))) >= _ECHO:
        return "copies the seed prompt or the document"
    return None


def _met_before(text: str, guard: Guard, before: Seen) -> str | None:
    """Where else the prompt stands, if it does."""
    if guard.collision(text):
        return "an evaluation question"
    if guard.near(text):
        return "near to an evaluation question"
    alike = before.like(text)
    if alike is None:
        return None
    return "a duplicate" if normalised(alike) == normalised(text) else "a near-duplicate"
