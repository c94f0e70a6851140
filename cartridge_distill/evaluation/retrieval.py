"""Retrieval at the cartridge's own cost: the best chunk of a document, in as many KV tokens.

The rival of a cartridge is not the whole document but what one can read in the same memory. A
document is cut at sentence ends into chunks that, rendered as a document of their own, have at most
the budget's tokens; BM25 (Robertson and Zaragoza 2009, in `bm25s`' default variant) ranks them by
the question's words, and the first is taken. The question alone is the query, as the user asked it;
the stem of a started answer is not part of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import bm25s
import numpy as np

from cartridge_distill.data.documents.structure import line_sentences
from cartridge_distill.util.errors import ConfigError

# It reports every token it indexes, at DEBUG.
logging.getLogger("bm25s").setLevel(logging.WARNING)

Render = Callable[[str], list[int]]


class ChunkIndex:
    """The chunks of one document.

    Args:
        text: the document's.
        render: text -> ids of a document prefix (`prompts.render_document` with its tokenizer).
        budget: tokens that a rendered chunk may have.

    Attributes:
        chunks: their texts, in order.
        ids: their rendered token ids, at most ``budget`` each.

    Raises:
        ConfigError: not even one word fits the budget.
    """

    def __init__(self, text: str, render: Render, budget: int) -> None:
        found = list(_chunks(text, render, budget))
        self.chunks = [chunk for chunk, _ in found]
        self.ids = [ids for _, ids in found]
        self._bm25 = bm25s.BM25()
        self._bm25.index(_words(self.chunks), show_progress=False)

    def best(self, question: str) -> int:
        """The place of the chunk that answers best; the first one where no word is shared."""
        scores = self._bm25.get_scores(_words([question])[0])
        return int(np.argmax(scores))


def _words(texts: list[str]) -> list[list[str]]:
    words: list[list[str]] = bm25s.tokenize(
        texts, stopwords="en", return_ids=False, show_progress=False
    )
    return words


def _chunks(text: str, render: Render, budget: int) -> Iterator[tuple[str, list[int]]]:
    """Whole sentences, as many as fit; a sentence that is too long by itself is cut at a word."""
    taken, taken_ids = "", list[int]()
    for piece in _pieces(text, render, budget):
        joined = f"{taken} {piece}".strip()
        ids = render(joined)
        if taken and len(ids) > budget:
            yield taken, taken_ids
            joined, ids = piece, render(piece)
        taken, taken_ids = joined, ids
    if taken:
        yield taken, taken_ids


def _pieces(text: str, render: Render, budget: int) -> Iterator[str]:
    """Sentences, and the parts of those that are over the budget by themselves."""
    for sentence in line_sentences(text):
        words = sentence.split()
        while words:
            fits = _most(words, lambda some: len(render(" ".join(some))) <= budget)
            if fits == 0:
                raise ConfigError(
                    f"retrieval has {budget} KV tokens, and the word {words[0]!r} with the chat "
                    f"template around it takes {len(render(words[0]))}; use a larger cartridge, or "
                    "leave 'best chunk' out of --conditions"
                )
            yield " ".join(words[:fits])
            words = words[fits:]


def _most(words: list[str], fits: Callable[[list[str]], bool]) -> int:
    """How many of the first words fit; more words never fit better."""
    if fits(words):
        return len(words)
    low, high = 0, len(words)  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(words[:middle]) else (low, middle)
    return low
