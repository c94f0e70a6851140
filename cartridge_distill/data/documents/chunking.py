"""A long text in pieces of at most so many tokens, cut where its structure is strongest.

From where a piece begins, the furthest boundary (structure.py) that still fits the budget is looked
for; the cut is made at the strongest boundary in the second half of what fits, the last of them
where several are as strong. So pieces begin at headings where there are some, are at least half
full, and end with a whole sentence.

Only a sentence that is longer than the budget by itself is cut inside: at a line end, else between
words, else between letters. Such a piece says so (`torn`).

The pieces in order, with the white space between them, are the text again: nothing is left out,
nothing stands in two of them.

The work grows with the text, not faster, also where it is one line without a full stop: for each
piece only a stretch of a few budgets is looked at.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from cartridge_distill.data.documents.blocks import Form
from cartridge_distill.data.documents.fitting import Fitting
from cartridge_distill.data.documents.structure import Boundary, Strength, boundaries
from cartridge_distill.util.errors import DocumentError


@dataclass(frozen=True)
class Chunk:
    """`text[start:end]`, without white space around it.

    Attributes:
        torn: it ends inside a sentence that was longer than the budget.
    """

    start: int
    end: int
    text: str
    torn: bool = False


_LOOKED_AT = 64  # characters for each token of the budget: more are looked at in no sentence
_INSIDE = (re.compile(r"\n\s*"), re.compile(r"\s+"), re.compile(r"(?<=.)(?=.)"))
_SOMETHING = re.compile(r"\S")


def chunk_text(text: str, budget: int, length: Callable[[str], int], form: Form) -> list[Chunk]:
    """Cuts a text into pieces.

    Args:
        text: the text.
        budget: tokens of a piece at most.
        length: tokens of a text, with whatever comes around it when it is read.
        form: which rules its structure is read by.

    Returns:
        At least one piece; none is empty.

    Raises:
        DocumentError: the text is empty, or not even one character fits the budget.
    """
    if not text.strip():
        raise DocumentError(
            "the text is empty, and cannot be cut into pieces; fix: give one with words"
        )
    places = [*boundaries(text, form), Boundary(len(text), Strength.CHAPTER)]
    offsets = [place.offset for place in places]
    fitting = Fitting(lambda start, end: length(text[start:end].strip()), budget)
    chunks: list[Chunk] = []
    start, passed = 0, 0
    bar = tqdm(total=len(text), desc="cutting", unit="char", leave=False, delay=3, disable=None)
    while _SOMETHING.search(text, start):
        reach = fitting.furthest(start, offsets, passed)
        if reach is not None:
            cut = _strongest(places[passed : reach + 1], start).offset
        else:
            cut = _inside_sentence(text, start, offsets[passed], budget, fitting)
        chunks.append(_stripped(text, start, cut, torn=reach is None))
        bar.update(cut - start)
        start = cut
        passed = bisect_right(offsets, start, lo=passed)
    bar.close()
    return chunks


def _strongest(places: Sequence[Boundary], start: int) -> Boundary:
    """The best place in the second half; the last one when the rest of the text fits."""
    half = start + (places[-1].offset - start) / 2
    candidates = [place for place in places if place.offset >= half]
    return min(candidates, key=lambda place: (place.strength, -place.offset))


def _inside_sentence(text: str, start: int, end: int, budget: int, fitting: Fitting) -> int:
    """Where to cut a sentence that does not fit; the cut lies before `end`."""
    first = _SOMETHING.search(text, start)
    begin = first.start() if first else start
    end = min(end, begin + _LOOKED_AT * budget)
    for pattern in _INSIDE:
        found = (match.end() for match in pattern.finditer(text, begin, end))
        offsets = [offset for offset in found if begin < offset < end]
        reach = fitting.furthest(start, offsets)
        if reach is not None:
            return offsets[reach]
    raise DocumentError(
        f"a budget of {budget} tokens is too small for any text, for the tokens around a document "
        "alone are as many; fix: allow more"
    )


def _stripped(text: str, start: int, end: int, torn: bool) -> Chunk:
    piece = text[start:end]
    begin = start + len(piece) - len(piece.lstrip())
    return Chunk(begin, begin + len(piece.strip()), piece.strip(), torn)
