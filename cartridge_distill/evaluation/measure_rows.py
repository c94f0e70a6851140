"""Rows of the measures that ``--measures`` asks for: one a text, and one an unrelated prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

FREE, STARTED = "free", "started"
GREEDY, SAMPLED = "greedy", "sampled"
TEXTS = ((FREE, GREEDY), (FREE, SAMPLED), (STARTED, GREEDY), (STARTED, SAMPLED))
"""How a condition's own text begins and how its tokens are chosen, in the order of the rows."""

OWN_TEXTS_FILE = "evaluation_own_texts.parquet"
OFF_CONTEXT_FILE = "evaluation_off_context.parquet"


@dataclass(frozen=True)
class OwnText:
    """What one condition wrote to one question; a row of ``evaluation_own_texts.parquet``.

    Attributes:
        start: ``free``, or ``started`` with the question's stem.
        sampling: ``greedy``, or ``sampled`` at ``temperature``.
        text: without special tokens.
        ended: the condition ended it itself, and did not run into the limit.
        kl: for each of its tokens KL(teacher || condition), nats, over the whole vocabulary.
        reverse_kl: for each of its tokens KL(condition || teacher).
        overlap: sum over its tokens of the part of the teacher's 20 likeliest tokens that are among
            the condition's.
        overlap_mass: sum over its tokens of the probability that these shared tokens have, the
            mean of both.
        entropy: sum over its tokens of the condition's entropy, nats.
        repeated, ngrams: 4-grams of its tokens that stood there before, and all.
        matched: the right answer is contained in it.
    """

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [
            ("condition", pa.string()),
            ("document_id", pa.string()),
            ("question_index", pa.int64()),
            ("start", pa.string()),
            ("sampling", pa.string()),
            ("temperature", pa.float64()),
            ("seed", pa.int64()),
            ("text", pa.string()),
            ("ended", pa.bool_()),
            ("kl", pa.list_(pa.float64())),
            ("reverse_kl", pa.list_(pa.float64())),
            ("overlap", pa.float64()),
            ("overlap_mass", pa.float64()),
            ("entropy", pa.float64()),
            ("repeated", pa.int64()),
            ("ngrams", pa.int64()),
            ("matched", pa.bool_()),
            ("kv_tokens", pa.int64()),
        ]
    )

    condition: str
    document_id: str
    question_index: int
    start: str
    sampling: str
    temperature: float
    seed: int
    text: str
    ended: bool
    kl: list[float]
    reverse_kl: list[float]
    overlap: float
    overlap_mass: float
    entropy: float
    repeated: int
    ngrams: int
    matched: bool
    kv_tokens: int

    @property
    def tokens(self) -> int:
        return len(self.kl)

    @property
    def index(self) -> int:
        """Its place among all texts of its condition."""
        return own_text_index(self.question_index, self.start, self.sampling)


def own_text_index(question_index: int, start: str, sampling: str) -> int:
    """The place of a text among all of its condition."""
    return question_index * len(TEXTS) + TEXTS.index((start, sampling))


@dataclass(frozen=True)
class OffContext:
    """One unrelated prompt under one condition; a row of ``evaluation_off_context.parquet``.

    Attributes:
        document_id: that the conditions that read one have read.
        kl_sum: nats, over the ``kl_tokens`` tokens of the bare model's answer.
    """

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [
            ("condition", pa.string()),
            ("document_id", pa.string()),
            ("prompt_index", pa.int64()),
            ("prompt", pa.string()),
            ("seed", pa.int64()),
            ("kl_sum", pa.float64()),
            ("kl_tokens", pa.int64()),
            ("kv_tokens", pa.int64()),
        ]
    )

    condition: str
    document_id: str
    prompt_index: int
    prompt: str
    seed: int
    kl_sum: float
    kl_tokens: int
    kv_tokens: int
