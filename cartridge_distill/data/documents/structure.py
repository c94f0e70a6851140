"""Where a text may be cut: its headings, paragraphs, list items and sentences.

Works on Markdown, on what `reading` makes of HTML, and on plain text with hard line ends. Line ends
inside a paragraph mean nothing: a sentence goes on over them. A heading belongs to what follows it,
so there is no place to cut between the two.

A heading is `# ...`, a line underlined with `===` or `---`, or, in plain text, a short line by
itself that begins like a title, does not end like a sentence and stands over ordinary prose.

Sentences end at `.`, `!` or `?` before white space and anything but a lower-case letter or a
digit; titles, initials and common abbreviations end none. When in doubt there is no end: a missed
end costs a longer piece, a wrong one a torn sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise


class Strength(IntEnum):
    """How good a place is to cut at; smaller is better. A heading's is its depth, 1 to 6."""

    CHAPTER = 1
    PLAIN_HEADING = 6
    PARAGRAPH = 7
    ITEM = 8
    SENTENCE = 9


@dataclass(frozen=True)
class Boundary:
    """A unit of the text begins at this offset."""

    offset: int
    strength: int


@dataclass(frozen=True)
class Block:
    """A heading, a fenced piece of code, or lines of prose; `text[start:end]`.

    Attributes:
        depth: of a heading, 1 to 6; 0 otherwise.
        title: of a heading.
        fenced: code: each line is a unit.
    """

    start: int
    end: int
    depth: int = 0
    title: str = ""
    fenced: bool = False


_FENCE = re.compile(r" {0,3}(```|~~~)")
_HASHES = re.compile(r" {0,3}(#{1,6})[ \t]+(\S.*?)[ \t#]*$")
_UNDERLINE = re.compile(r" {0,3}(=+|-{2,})\s*$")
_ITEM = re.compile(r"[ \t]*(?:[-*+•–][ \t]|\d{1,3}[.)][ \t]|\|)")
_TITLE_LIKE = re.compile(r"[\W\d]*[^\W\d_].*[^.!?:;,\s]$")
_LONGEST_TITLE = 80
_ABBREVIATIONS = (
    *("Dr", "Mr", "Mrs", "Ms", "Prof", "St", "[A-Z]"),
    *("Fig", "Figs", "No", "Nos", "Sec", "Vol", "pp", "vs", "cf", "al", "etc", "approx"),
    *("Inc", "Ltd", "Co", "Jr", "Sr", r"e\.g", r"i\.e"),
)
_NO_END = "".join(rf"(?<!\b{word}\.)" for word in _ABBREVIATIONS)
_SENTENCE_END = re.compile(
    rf"{_NO_END}(?<=[.!?…])[\"')\]”’»]*\s+(?=[^\W\d_]|[\"'(\[“‘«¿¡])|(?<=[。！？])(?=\S)"
)


def sentence_starts(text: str) -> list[int]:
    """Offsets at which the second and further sentences of a piece of prose begin."""
    ends = (match.end() for match in _SENTENCE_END.finditer(text))
    return [end for end in ends if not text[end].islower()]


def blocks(text: str) -> list[Block]:
    """The blocks of a text in order; blank lines between them belong to none."""
    found = list(_raw_blocks(text))
    with_titles = [*found]
    for number, (block, after) in enumerate(pairwise(found)):
        if _titles(text, block) and not after.depth and not _titles(text, after):
            title = text[block.start : block.end].strip()
            with_titles[number] = Block(block.start, block.end, Strength.PLAIN_HEADING, title)
    return with_titles


def boundaries(text: str) -> list[Boundary]:
    """All places to cut at, in order; the beginning of the text is not among them."""
    found: list[Boundary] = []
    under_heading = True  # nothing to cut before the first block either
    for block in blocks(text):
        if not under_heading:
            found.append(Boundary(block.start, block.depth or Strength.PARAGRAPH))
        if not block.depth:
            found += _inside(text, block)
        under_heading = block.depth > 0
    return found


def sections(text: str) -> list[tuple[str | None, int, int]]:
    """(heading or None, start, end) of what stands between headings; none of them is empty."""
    found: list[tuple[str | None, int, int]] = []
    heading: str | None = None
    start = None
    for block in blocks(text):
        if block.depth:
            heading, start = block.title, None
        elif start is None:
            start = block.start
            found.append((heading, start, block.end))
        else:
            found[-1] = (heading, start, block.end)
    return found


def sentences(text: str) -> list[str]:
    """The sentences and list items of a text's prose, in order, each on one line.

    Headings, code and table rows are left out.
    """
    found = []
    for block in blocks(text):
        if block.depth or block.fenced:
            continue
        cuts = [block.start, *(boundary.offset for boundary in _inside(text, block)), block.end]
        pieces = (text[start:end] for start, end in pairwise(cuts))
        found += [" ".join(piece.split()) for piece in pieces if not piece.lstrip().startswith("|")]
    return found


def line_sentences(text: str) -> list[str]:
    """The sentences of a text whose lines are facts, as in a record: a line end ends one, too."""
    found = []
    for line in text.splitlines():
        cuts = [0, *sentence_starts(line), len(line)]
        found += [line[start:end].strip() for start, end in pairwise(cuts)]
    return [sentence for sentence in found if sentence]


def first_heading(text: str) -> str | None:
    """The first heading that is marked as one."""
    marked = (block.title for block in _raw_blocks(text) if block.depth)
    return next(marked, None)


def _titles(text: str, block: Block) -> bool:
    """Does this block look like a title in plain text?"""
    line = text[block.start : block.end].strip()
    if block.depth or block.fenced or "\n" in line or len(line) > _LONGEST_TITLE:
        return False
    first = next((char for char in line if char.isalpha()), "a")
    return bool(_TITLE_LIKE.match(line)) and not first.islower() and not _ITEM.match(line)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    offset = 0
    for line in text.splitlines(keepends=True):
        yield offset, line
        offset += len(line)


def _raw_blocks(text: str) -> Iterator[Block]:
    """Blocks with marked headings only."""
    start: int | None = None  # of the prose that is being collected
    end = 0
    fence: str | None = None
    fence_start = 0
    for offset, line in _lines(text):
        after = offset + len(line)
        if fence is not None:
            if line.lstrip().startswith(fence):
                yield Block(fence_start, after, fenced=True)
                fence = None
            continue
        opening, hashes = _FENCE.match(line), _HASHES.match(line)
        if start is not None and (opening or hashes or not line.strip()):
            yield _prose(text, start, end)
            start = None
        if opening:
            fence, fence_start = opening.group(1), offset
        elif hashes:
            yield Block(offset, after, len(hashes.group(1)), hashes.group(2))
        elif line.strip():
            start = offset if start is None else start
            end = after
    if fence is not None:
        yield Block(fence_start, len(text), fenced=True)
    elif start is not None:
        yield _prose(text, start, end)


def _prose(text: str, start: int, end: int) -> Block:
    lines = text[start:end].splitlines()
    underline = _UNDERLINE.match(lines[1]) if len(lines) == 2 else None
    if underline:
        depth = 1 if underline.group(1).startswith("=") else 2
        return Block(start, end, depth, lines[0].strip())
    return Block(start, end)


def _inside(text: str, block: Block) -> list[Boundary]:
    """Boundaries inside a block: list items, table rows and lines of code, then sentences."""
    lines = [(block.start + at, line) for at, line in _lines(text[block.start : block.end])]
    items = [
        Boundary(offset, Strength.ITEM)
        for offset, line in lines[1:]
        if (block.fenced or _ITEM.match(line)) and line.strip()
    ]
    if block.fenced:
        return items
    known = {boundary.offset for boundary in items}
    starts = (block.start + at for at in sentence_starts(text[block.start : block.end]))
    found = items + [Boundary(at, Strength.SENTENCE) for at in starts if at not in known]
    return sorted(found, key=lambda boundary: boundary.offset)
