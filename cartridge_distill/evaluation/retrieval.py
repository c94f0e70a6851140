"""Retrieval at the cartridge's own cost: the best chunk of a document, in as many KV tokens.

The rival of a cartridge is not the whole document but what one can read in the same memory. A
document is cut at sentence ends into chunks that, rendered as a document of their own, have at most
the budget's tokens; BM25 (Robertson and Zaragoza 2009, in `bm25s`' default variant) ranks them by
the question's words (data/words.py; less English function words), and the first is taken. The
question alone is the query, as the user asked it;
the stem of a started answer is not part of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial

import bm25s
import numpy as np
from bm25s.stopwords import STOPWORDS_EN

from cartridge_distill.data.documents.fitting import Fitting
from cartridge_distill.data.documents.structure import line_sentences
from cartridge_distill.data.words import is_unspaced, terms
from cartridge_distill.util.errors import ConfigError

# It reports every token it indexes, at DEBUG.
logging.getLogger("bm25s").setLevel(logging.WARNING)

_FUNCTION = frozenset(STOPWORDS_EN)
_LONGEST_WORD = 40  # letters; what is longer may be cut inside

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
        query = [word for word in _words([question])[0] if word in self._bm25.vocab_dict]
        if not query:
            return 0
        scores = self._bm25.get_scores(query)
        return int(np.argmax(scores))


def _words(texts: list[str]) -> list[list[str]]:
    return [[word for word in terms(text) if word not in _FUNCTION] for text in texts]


def _chunks(text: str, render: Render, budget: int) -> Iterator[tuple[str, list[int]]]:
    """Whole sentences, as many as fit; a sentence that is too long by itself is cut at a word."""
    taken, taken_ids = "", list[int]()
    for piece in _pieces(text, render, budget):
        space = "" if taken and is_unspaced(taken[-1]) and is_unspaced(piece[0]) else " "
        joined = f"{taken}{space}{piece}".strip()
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
        sentence = " ".join(sentence.split())
        ends = _word_ends(sentence)
        fitting = Fitting(partial(_rendered_size, render, sentence), budget)
        start, first = 0, 0
        while first < len(ends):
            last = fitting.furthest(start, ends, first)
            if last is None:
                word = sentence[start : ends[first]].strip()
                raise ConfigError(
                    f"retrieval has {budget} KV tokens, and the word {word!r} with the chat "
                    f"template around it takes {len(render(word))}; fix: use a larger cartridge, "
                    "or leave 'best chunk' out of --conditions"
                )
            yield sentence[start : ends[last]].strip()
            start, first = ends[last], last + 1


def _rendered_size(render: Render, sentence: str, start: int, end: int) -> int:
    return len(render(sentence[start:end].strip()))


def _word_ends(sentence: str) -> list[int]:
    """Where it may be cut: at spaces, behind unspaced characters, inside what is no real word."""
    ends, begin = [], 0
    for at, character in enumerate(sentence):
        if character == " " or is_unspaced(character) or at + 1 - begin >= _LONGEST_WORD:
            ends.append(at + 1)
            begin = at + 1
    return ends if begin == len(sentence) else [*ends, len(sentence)]
