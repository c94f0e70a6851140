"""What the model has read before a question: the lines of the table.

===================  ================================================================
no document          what the model always begins with: the begin-of-text, or nothing
full document        the whole document; the teacher
best chunk           the chunk of the document that BM25 finds for the question, with at
                     most as many KV tokens as the cartridge
untrained cartridge  what training began with: the KV of some tokens of the document
trained cartridge    the cartridge
===================  ================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cartridge_distill.cartridge.beginnings import ATTENDED, BEGINNINGS, TEXT
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.distill.teacher import Teacher
from cartridge_distill.evaluation.names import BEST_CHUNK, FULL_DOCUMENT, NO_DOCUMENT, UNTRAINED
from cartridge_distill.evaluation.retrieval import ChunkIndex
from cartridge_distill.evaluation.scoring import device_of
from cartridge_distill.model.beginning import first_prefix
from cartridge_distill.model.prefill import prefix_from_tokens
from cartridge_distill.model.prompts import begin_of_text
from cartridge_distill.util.errors import ConfigError


@dataclass(frozen=True, eq=False)
class View:
    """What stands before a prompt.

    Attributes:
        prefix: its KV; None for nothing.
        ids: the tokens it is the KV of; None where there are none, as of a trained cartridge.
    """

    prefix: Prefix | None
    ids: Sequence[int] | None

    @property
    def kv_tokens(self) -> int:
        return self.prefix.num_tokens if self.prefix is not None else 0


class Condition(Protocol):
    """A line of the table."""

    @property
    def name(self) -> str: ...

    def view(self, document_id: str, question: str) -> View:
        """What the model has read when it is asked this about that document.

        Equal answers are the same object, so that questions with one prefix run together.
        """
        ...


class Fixed:
    """One prefix whatever is asked: a begin-of-text, a cartridge, or nothing."""

    def __init__(self, name: str, prefix: Prefix | None, ids: Sequence[int] | None = None) -> None:
        self.name = name
        self._view = View(prefix, ids)

    def view(self, document_id: str, question: str) -> View:
        return self._view


def no_document(model: Any, tokenizer: Any) -> Fixed:
    """The bare model. A model that never saw text without its begin-of-text is lost without it."""
    begin = begin_of_text(tokenizer)
    return Fixed(NO_DOCUMENT, _prefix(model, begin) if begin else None, begin)


class FullDocument:
    """The whole document. One document's KV is kept at a time.

    Args:
        apart: reads the documents for itself; what the teacher keeps is not touched.
    """

    name = FULL_DOCUMENT

    def __init__(self, teacher: Teacher, apart: bool = False) -> None:
        self._teacher, self._apart = teacher, apart
        self._kept: tuple[str, View] | None = None

    def view(self, document_id: str, question: str = "") -> View:
        if self._kept is None or self._kept[0] != document_id:
            ids = self._teacher.document_ids(document_id)
            if self._apart:
                prefix = _prefix(self._teacher.model, ids)
            else:
                prefix = self._teacher.prefix(document_id)
            self._kept = document_id, View(prefix, ids)
        return self._kept[1]

    def forget(self) -> None:
        """Gives the kept document's KV back."""
        self._kept = None


class BestChunk:
    """The chunk that retrieval finds, as a document of its own, within a budget of KV tokens."""

    name = BEST_CHUNK

    def __init__(self, teacher: Teacher, budget: int) -> None:
        self._teacher, self._budget = teacher, budget
        self._document_id: str | None = None
        self._index: ChunkIndex | None = None
        self._views: dict[int, View] = {}  # of one document: together about its size

    def view(self, document_id: str, question: str) -> View:
        if self._index is None or self._document_id != document_id:
            text = self._teacher.documents.text(document_id)
            self._index = ChunkIndex(text, self._teacher.render, self._budget)
            self._document_id, self._views = document_id, {}
        found = self._index.best(question)
        if found not in self._views:
            ids = self._index.ids[found]
            self._views[found] = View(_prefix(self._teacher.model, ids), ids)
        return self._views[found]


def untrained(
    teacher: Teacher, document_id: str, tokens: int, frozen: int = 1, init: str = TEXT
) -> Fixed:
    """The cartridge that training from a document begins with.

    Args:
        frozen: of its tokens.
        init: what it begins as, see :mod:`cartridge_distill.model.beginning`.

    Raises:
        ConfigError: the document has fewer tokens, or the model has no such beginning.
    """
    ids = teacher.document_ids(document_id)
    if len(ids) < tokens:
        raise ConfigError(
            f"the document {document_id!r} has {len(ids)} tokens, fewer than the cartridge's "
            f"{tokens}: there is no cartridge of {tokens} of its tokens; fix: name the one that "
            f"training began with (--untrained), or leave {UNTRAINED!r} out of --conditions"
        )
    row = torch.tensor(ids, device=device_of(teacher.model))
    read = teacher.prefix(document_id) if init == ATTENDED else None
    prefix = first_prefix(teacher.model, row, tokens, frozen, init, read)
    return Fixed(UNTRAINED, prefix, ids[:tokens] if init == TEXT else None)


def began_as(recipe: Mapping[str, Any]) -> str:
    """What a cartridge began as, as its recipe says; the first tokens where that is no part of a
    document."""
    said = recipe.get("cartridge.init")
    return said if said in BEGINNINGS else TEXT


def _prefix(model: Any, ids: Sequence[int]) -> Prefix:
    return prefix_from_tokens(model, torch.tensor(list(ids), device=device_of(model)))
