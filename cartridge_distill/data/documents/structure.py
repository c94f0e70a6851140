"""Where a text may be cut: its headings, paragraphs, list items and sentences.

What is a heading and what is code, `blocks` decides by the form of the text (Markdown or plain).
Line ends inside a paragraph mean nothing: a sentence goes on over them. A heading belongs to what
follows it, so there is no place to cut between the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Literal

from cartridge_distill.data.documents.blocks import (
    ITEM,
    PLAIN_HEADING,
    Block,
    Form,
    blocks,
    lines_of,
    marked_blocks,
)
from cartridge_distill.data.documents.sentence_ends import sentence_starts
from cartridge_distill.data.words import is_unspaced

LONGEST_SENTENCE = 1_000  # characters that a prompt is made of; a longer sentence gives stretches
_BEFORE_TITLE = 200  # characters: badges, a date, an author
_BREAKS = (re.compile(r"\n\s*"), re.compile(r"(?<=[;:,])\s+|(?<=[、，；：])"), re.compile(r"\s+"))


class Strength(IntEnum):
    """How good a place is to cut at; smaller is better. A heading's is its depth, 1 to 6."""

    CHAPTER = 1
    PLAIN_HEADING = PLAIN_HEADING
    PARAGRAPH = 7
    ITEM = 8
    SENTENCE = 9


@dataclass(frozen=True)
class Boundary:
    """A unit of the text begins at this offset."""

    offset: int
    strength: int


@dataclass(frozen=True)
class Piece:
    """What `text[start:end]` is: a heading, a line of code, a table row, a sentence.

    Attributes:
        stretch: of a sentence: it is a part of one that is too long to be a prompt as a whole.
    """

    kind: Literal["heading", "code", "table", "sentence"]
    start: int
    end: int
    stretch: bool = False


def boundaries(text: str, form: Form) -> list[Boundary]:
    """All places to cut at, in order; the beginning of the text is not among them."""
    found: list[Boundary] = []
    under_heading = True  # nothing to cut before the first block either
    for block in blocks(text, form):
        if not under_heading:
            found.append(Boundary(block.start, block.depth or Strength.PARAGRAPH))
        if not block.depth:
            found += _inside(text, block)
        under_heading = block.depth > 0
    return found


def sections(text: str, form: Form) -> list[tuple[str | None, int, int]]:
    """(heading or None, start, end) of what stands between headings; none of them is empty."""
    found: list[tuple[str | None, int, int]] = []
    heading: str | None = None
    start = None
    for block in blocks(text, form):
        if block.depth:
            heading, start = block.title, None
        elif start is None:
            start = block.start
            found.append((heading, start, block.end))
        else:
            found[-1] = (heading, start, block.end)
    return found


def pieces(text: str, form: Form) -> Iterator[Piece]:
    """All of a text in order, each piece with what it is; only blank lines belong to none."""
    for block in blocks(text, form):
        if block.depth:
            yield Piece("heading", block.start, block.end)
            continue
        cuts = [block.start, *(boundary.offset for boundary in _inside(text, block)), block.end]
        row, line_end = False, True
        for start, end in pairwise(cuts):
            # The end of a sentence in a table's cell is inside its row.
            row = text[start:end].lstrip().startswith("|") or row and not line_end
            line_end = "\n" in text[start:end]
            if block.code:
                yield Piece("code", start, end)
            elif row:
                yield Piece("table", start, end)
            elif end - start <= LONGEST_SENTENCE:
                yield Piece("sentence", start, end)
            else:
                for stretch in pairwise(_stretches(text, start, end)):
                    yield Piece("sentence", *stretch, stretch=True)


def sentences(text: str, form: Form) -> list[str]:
    """The sentences and list items of a text's prose, in order, each on one line.

    Headings, code and table rows are left out. A sentence of more than `LONGEST_SENTENCE`
    characters comes as stretches of at most as many.
    """
    found = (piece for piece in pieces(text, form) if piece.kind == "sentence")
    return [one_line(text[piece.start : piece.end]) for piece in found]


def one_line(text: str) -> str:
    """A piece of prose on one line: with a space for each line end that stands between words.

    Scripts without spaces (Chinese, Japanese, Thai) have none at a line's end either.
    """
    lines = [" ".join(line.split()) for line in text.splitlines()]
    joined = ""
    for line in filter(None, lines):
        inside = joined and is_unspaced(joined[-1]) and is_unspaced(line[0])
        joined += ("" if inside or not joined else " ") + line
    return joined


def line_sentences(text: str) -> list[str]:
    """The sentences of a text whose lines are facts, as in a record: a line end ends one, too.

    They may be of any length; `shortened` cuts long ones.
    """
    found = []
    for line in text.splitlines():
        cuts = [0, *sentence_starts(line), len(line)]
        found += [line[start:end].strip() for start, end in pairwise(cuts)]
    return [sentence for sentence in found if sentence]


def shortened(sentences: Iterable[str]) -> list[str]:
    """The same with stretches of at most `LONGEST_SENTENCE` characters in place of longer ones."""
    return [
        said[start:end].strip()
        for said in sentences
        for start, end in pairwise(_stretches(said, 0, len(said)))
        if said[start:end].strip()
    ]


def first_heading(text: str, form: Form) -> str | None:
    """The heading that names the whole text, of those that are marked as one.

    It is the first, if it stands over all others: no other is as high, or hardly anything stands
    before it. "Sponsors", between a text's introduction and its next chapter, is no name for it.
    """
    headings = [block for block in marked_blocks(text, form) if block.depth]
    if not headings:
        return None
    first = headings[0]
    as_high = sum(block.depth <= first.depth for block in headings)
    before = len("".join(text[: first.start].split()))
    return first.title if as_high == 1 or before <= _BEFORE_TITLE else None


def _stretches(text: str, start: int, end: int) -> list[int]:
    """Cuts of a long sentence, ends included: at a line's end, a comma or the like, a space."""
    cuts = [start]
    while end - cuts[-1] > LONGEST_SENTENCE:
        half, most = cuts[-1] + LONGEST_SENTENCE // 2, cuts[-1] + LONGEST_SENTENCE
        last = (max((m.end() for m in b.finditer(text, half, most)), default=0) for b in _BREAKS)
        cuts.append(next((cut for cut in last if half < cut < most), most))
    return [*cuts, end]


def _inside(text: str, block: Block) -> list[Boundary]:
    """Boundaries inside a block: list items, table rows and lines of code, then sentences."""
    lines = [(block.start + at, line) for at, line in lines_of(text[block.start : block.end])]
    items = [
        Boundary(offset, Strength.ITEM)
        for offset, line in lines[1:]
        if (block.code or ITEM.match(line)) and line.strip()
    ]
    if block.code:
        return items
    known = {boundary.offset for boundary in items}
    starts = (block.start + at for at in sentence_starts(text[block.start : block.end]))
    found = items + [Boundary(at, Strength.SENTENCE) for at in starts if at not in known]
    return sorted(found, key=lambda boundary: boundary.offset)
