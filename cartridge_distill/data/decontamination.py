"""Texts that must not meet: training prompts and evaluation questions, and one prompt twice.

Three rules, all on words (words.py):

- A prompt **holds** an evaluation text when the text's words stand in it one after the other.
- A prompt is **near** an evaluation question when their content words (less those of `_FUNCTION`,
  a final s not counted) have a Jaccard similarity of 0.75: for a question of four content words or
  more in any stretch of the prompt that is as long, for a shorter one in the prompt as a whole,
  lest every mention of its subject count. A question of one content word has no near.
- Two prompts are **near-duplicates** when their sets of words have a Jaccard similarity of 0.8.

Not done here: paraphrases in other words. A model that asks about everything in a document asks
about what the evaluation asks about, too; only the question itself is kept from it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from typing import Any

from cartridge_distill.data.records import Question
from cartridge_distill.data.words import normalised, words
from cartridge_distill.util.errors import ConfigError

NEAR_EVALUATION = 0.75
NEAR_DUPLICATE = 0.8
_STRETCH = 4  # content words from which on a stretch of the prompt is enough
_FUNCTION = frozenset(
    "a an and any are as at be been but by can did do does for from had has have he her hers him "
    "his how i in into is it its me my no not of on or our she so some such than that the their "
    "them then there these they this those to us was we were what when where which who whom whose "
    "why will with would you your".split()
)


def jaccard(one: Set[str], other: Set[str]) -> float:
    """Shared by all; 0 for two empty sets."""
    union = len(one | other)
    return len(one & other) / union if union else 0.0


def _content(text: str) -> list[str]:
    return [word.removesuffix("s") or word for word in words(text) if word not in _FUNCTION]


class Guard:
    """Knows the evaluation questions and stems, and finds them in a training prompt."""

    def __init__(self, questions: Sequence[Question]) -> None:
        texts = [text for q in questions for text in (q.question, q.stem) if text]
        self._evaluation_texts = sorted({normalised(text) for text in texts})
        by_words = {frozenset(_content(q.question)): q.question for q in questions}
        self._near = {key: question for key, question in by_words.items() if len(key) > 1}

    def collision(self, text: str) -> str | None:
        """The evaluation text that `text` equals or contains, if any."""
        inside = normalised(text)
        return next((known for known in self._evaluation_texts if known in inside), None)

    def near(self, text: str) -> str | None:
        """The evaluation question that `text` is near to, if any."""
        content = _content(text)
        everything = frozenset(content)
        for key, question in self._near.items():
            if len(key & everything) < NEAR_EVALUATION * len(key):
                continue  # the similarity to any stretch is smaller yet
            size = len(key) if len(key) >= _STRETCH else len(content)
            stretches = range(max(1, len(content) - size + 1))
            if any(
                jaccard(key, set(content[at : at + size])) >= NEAR_EVALUATION for at in stretches
            ):
                return question
        return None

    def check(self, rows: Iterable[dict[str, Any]]) -> None:
        """Raises ConfigError when a prompt holds an evaluation text."""
        for number, row in enumerate(rows):
            for message in row["prompt"]:
                kept = self.collision(message["content"])
                if kept:
                    raise ConfigError(
                        f"Training prompt {number} of {row['patient_id']!r} contains the "
                        f"evaluation text {kept.strip()!r}: {message['content']!r}; fix: "
                        "take the row out, for evaluation questions must not be trained on"
                    )


class Seen:
    """Finds a text that is nearly one that was added before.

    Two sets of that similarity share one of their first few words in any common order; so only
    texts that share one of those are compared (Bayardo et al. 2007, doi:10.1145/1242572.1242591).
    Longer words first: they are rarer.
    """

    def __init__(self) -> None:
        self._texts: list[tuple[frozenset[str], str]] = []
        self._by_word: defaultdict[str, list[int]] = defaultdict(list)

    def like(self, text: str) -> str | None:
        """The text added before that this one nearly repeats, if any."""
        key = frozenset(words(text))
        candidates = {number for word in _first_words(key) for number in self._by_word[word]}
        for number in sorted(candidates):
            before, original = self._texts[number]
            if jaccard(key, before) >= NEAR_DUPLICATE:
                return original
        return None

    def add(self, text: str) -> None:
        """Remembers a prompt."""
        key = frozenset(words(text))
        for word in _first_words(key):
            self._by_word[word].append(len(self._texts))
        self._texts.append((key, text))


def _first_words(key: frozenset[str]) -> list[str]:
    ordered = sorted(key, key=lambda word: (-len(word), word))
    return ordered[: len(ordered) - math.ceil(NEAR_DUPLICATE * len(ordered)) + 1]


def check_held_out(train: Iterable[dict[str, Any]], val: Iterable[dict[str, Any]]) -> None:
    """Raises ConfigError when a prompt that is kept aside is among those that are trained on.

    What tells prompts apart is the last message: the user's, or the answer that has been started.
    """

    def key(row: dict[str, Any]) -> tuple[str, str]:
        return row["patient_id"], row["prompt"][-1]["content"]

    trained = {key(row) for row in train}
    for row in val:
        if key(row) in trained:
            raise ConfigError(
                f"The held-out prompt {key(row)[1]!r} of {key(row)[0]!r} is trained on, too; fix: "
                "prepare the data anew, and take the row out of the training file if it was put in"
            )
