"""A long text in pieces of at most so many tokens, cut where its structure is strongest.

From where a piece begins, the furthest boundary (structure.py) that still fits the budget is looked
for; the cut is made at the strongest boundary in the second half of what fits, the last of them
where several are as strong. So pieces begin at headings where there are some, are at least half
full, and end with a whole sentence.

Only a sentence that is longer than the budget by itself is cut inside: at a line end, else between
words, else between letters. Such a piece says so (`torn`).

The pieces in order, with the white space between them, are the text again: nothing is left out,
nothing stands in two of them.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


def chunk_text(text: str, budget: int, length: Callable[[str], int]) -> list[Chunk]:
    """Cuts a text into pieces.

    Args:
        text: the text.
        budget: tokens of a piece at most.
        length: tokens of a text, with whatever comes around it when it is read.

    Returns:
        At least one piece; none is empty.

    Raises:
        DocumentError: the text is empty, or not even one character fits the budget.
    """
    if not text.strip():
        raise DocumentError("The text is empty: there is nothing to cut into pieces.")
    places = [*boundaries(text), Boundary(len(text), Strength.CHAPTER)]
    chunks: list[Chunk] = []
    start, passed = 0, 0
    while start < len(text):
        if not text[start:].strip():
            break

        def fits(offset: int, start: int = start) -> bool:
            return length(text[start:offset].strip()) <= budget

        ahead = places[passed:]
        reach = _furthest([place.offset for place in ahead], fits)
        if reach is not None:
            cut = _strongest(ahead[: reach + 1], start).offset
        else:
            cut = _inside_sentence(text, start, ahead[0].offset, budget, fits)
        chunks.append(_stripped(text, start, cut, torn=reach is None))
        start = cut
        passed = bisect_right(places, start, key=lambda place: place.offset)
    return chunks


def _strongest(places: Sequence[Boundary], start: int) -> Boundary:
    """The best place in the second half; the last one when the rest of the text fits."""
    half = start + (places[-1].offset - start) / 2
    candidates = [place for place in places if place.offset >= half]
    return min(candidates, key=lambda place: (place.strength, -place.offset))


def _inside_sentence(
    text: str, start: int, end: int, budget: int, fits: Callable[[int], bool]
) -> int:
    """Where to cut a sentence that does not fit; the cut lies before `end`."""
    for pattern in (r"\n\s*", r"\s+", r"(?<=.)(?=.)"):
        offsets = [start + m.end() for m in re.finditer(pattern, text[start:end]) if m.end()]
        offsets = [offset for offset in offsets if text[start:offset].strip() and offset < end]
        reach = _furthest(offsets, fits)
        if reach is not None:
            return offsets[reach]
    raise DocumentError(
        f"A budget of {budget} tokens is too small for any text: the tokens around a document "
        "alone are as many. Allow more."
    )


def _furthest(offsets: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Index of the last offset that fits, None when the first does not.

    Steps that double, then bisection: only a few multiples of the budget are ever tokenised.
    """
    good, step, bad = -1, 1, len(offsets)
    while good + step < bad:
        if not fits(offsets[good + step]):
            bad = good + step
            break
        good += step
        step *= 2
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(offsets[middle]):
            good = middle
        else:
            bad = middle
    return good if good >= 0 else None


def _stripped(text: str, start: int, end: int, torn: bool) -> Chunk:
    piece = text[start:end]
    begin = start + len(piece) - len(piece.lstrip())
    return Chunk(begin, begin + len(piece.strip()), piece.strip(), torn)
