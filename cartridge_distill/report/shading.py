"""The document's text, shaded where the cartridge goes astray (``document_kl.json``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pydantic import BaseModel, field_validator

SHADING_FILE = "document_kl.json"
LEVELS = (0.1, 0.5, 1.0, 2.0, 4.0)
"""Nats from which on a token has the next stronger ground."""


class Document(BaseModel):
    """A document's tokens: ``[text, nats]``, or ``[text, nats, what the cartridge said]``."""

    document_id: str
    whole: bool
    tokens: list[tuple[str, float | None, str | None]]

    @field_validator("tokens", mode="before")
    @classmethod
    def _three(cls, rows: Any) -> Any:
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            return rows
        return [[*row, None] if len(row) == 2 else row for row in rows]


class Shading(BaseModel):
    """The contents of the file."""

    documents: list[Document]


@dataclass(frozen=True)
class Span:
    """Neighbours of one level; a token that the cartridge would have got wrong stands alone."""

    text: str
    level: int
    title: str


@dataclass(frozen=True)
class Shown:
    """A document as the page has it."""

    name: str
    whole: bool
    mean: float
    wrong: int
    tokens: int
    spans: list[Span]


def shown(documents: Sequence[Document]) -> list[Shown]:
    """Each document's spans, and how much of it the cartridge has."""
    made = []
    for document in documents:
        nats = [kl for _, kl, _ in document.tokens if kl is not None]
        if not nats:
            continue
        wrong = sum(said is not None for *_, said in document.tokens)
        mean = sum(nats) / len(nats)
        spans = list(_spans(document.tokens))
        made.append(Shown(document.document_id, document.whole, mean, wrong, len(nats), spans))
    return made


def _spans(tokens: Sequence[tuple[str, float | None, str | None]]) -> Iterator[Span]:
    def key(place: int) -> tuple[int, int]:
        _, kl, said = tokens[place]
        return _level(kl), place if said is not None else -1

    for (level, _), places in groupby(range(len(tokens)), key):
        group = [tokens[place] for place in places]
        text = "".join(part for part, *_ in group)
        _, kl, said = group[0]
        title = "" if said is None else f"the cartridge says “{said}” ({kl:.1f} nats)"
        yield Span(text, level, title)


def _level(kl: float | None) -> int:
    return 0 if kl is None else sum(kl >= least for least in LEVELS)
