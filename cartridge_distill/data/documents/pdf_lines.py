"""What the fonts of a PDF's lines say: which are headings, and which are code.

A heading is a line that is set larger than the text. It gets blank lines around it, so that it no
longer begins the sentence that follows; a heading of several lines becomes one. Code is lines that
are set in a font of one width: two or more in a row, or one below a colon. (A single one elsewhere
is a name that was too long for its line.) They are indented by four, and nothing else is: the form
`typeset` reads that as code.

Not done here: headings that are bold and no larger, which cannot be told from the heads of tables
and from words in a list.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

INDENT = "    "
_LARGER = 1.1  # than the text
_LONGEST_HEADING = 120
_ONE_WIDTH = re.compile(r"mono|courier|cmtt|cmsltt|cmitt|cmvtt|typewriter|consol|menlo|txtt", re.I)
_FIXED_PITCH = 1  # bit 1 of a font descriptor's flags
_LETTERS = re.compile(r"[^\W\d_]{2}")
_MOST_HEADINGS = 0.2  # of a PDF's letters
_MOST_CODE = 0.5  # of a PDF's letters: beyond it the font is that of its text


@dataclass
class Line:
    """A line of a page.

    Attributes:
        sizes: how many of its letters are set in each size.
        code: letters in a font of one width.
        letters: all of them.
    """

    text: str = ""
    sizes: Counter[float] = field(default_factory=Counter)
    code: int = 0
    letters: int = 0

    def add(self, text: str, size: float, one_width: bool) -> None:
        """More of the line."""
        self.text += text
        if letters := len(text.strip()):
            self.sizes[size] += letters
            self.letters += letters
            self.code += letters * one_width

    @property
    def is_code(self) -> bool:
        return 0 < self.letters == self.code


def is_of_one_width(font: Any) -> bool:
    """Whether a font says of itself, or by its name, that its letters are all as wide.

    Args:
        font: its dictionary in the PDF, or None.
    """
    if not font:
        return False
    if _ONE_WIDTH.search(str(font.get("/BaseFont", ""))):
        return True
    descriptor = font.get("/FontDescriptor")
    described = descriptor.get_object() if descriptor is not None else None
    flags = described.get("/Flags", 0) if isinstance(described, dict) else 0
    return bool(isinstance(flags, int) and flags & _FIXED_PITCH)


def marked_pages(pages: Sequence[Sequence[Line]]) -> tuple[list[str], Literal["plain", "typeset"]]:
    """The pages' texts, and their form: `typeset` where code was found in them."""
    sizes: Counter[float] = Counter()
    code = letters = 0
    for line in (line for page in pages for line in page):
        sizes.update(line.sizes)
        code, letters = code + line.code, letters + line.letters
    body = sizes.most_common(1)[0][0] if sizes else 0.0
    larger = sum(count for size, count in sizes.items() if size >= _LARGER * body)
    if larger > _MOST_HEADINGS * letters:  # the most common size is that of tables or notes
        body = float("inf")
    with_code = 0 < code <= _MOST_CODE * letters
    found = [list(_marked(page, body, with_code)) for page in pages]
    typeset = any(kind == "code" for page in found for kind, _ in page)
    return [_text(page, typeset) for page in found], "typeset" if typeset else "plain"


_Marked = tuple[Literal["heading", "code", "text"], list[str]]


def _marked(page: Sequence[Line], body: float, with_code: bool) -> Iterator[_Marked]:
    """Runs of lines of one kind; of headings one for each size."""
    before = ""
    for (kind, _), lines in groupby(page, lambda line: _kind(line, body, with_code)):
        said = [line.text for line in lines]
        if kind == "code" and len(said) == 1 and not before.rstrip().endswith(":"):
            kind = "text"
        if kind == "heading" and sum(map(len, said)) > _LONGEST_HEADING:
            kind = "text"
        yield kind, said
        before = said[-1] if said[-1].strip() else before


def _kind(
    line: Line, body: float, with_code: bool
) -> tuple[Literal["heading", "code", "text"], float]:
    if with_code and line.is_code:
        return "code", 0.0
    if min(line.sizes, default=0.0) >= _LARGER * body and _LETTERS.search(line.text):
        return "heading", max(line.sizes)
    return "text", 0.0


def _text(page: Sequence[_Marked], typeset: bool) -> str:
    parts: list[str] = []
    for kind, lines in page:
        if kind == "text":
            # What is no code is not indented like it.
            shown = [line.lstrip() if typeset else line for line in lines]
        elif kind == "code":
            shown = [*(INDENT + line for line in lines), ""]
        else:
            shown = [_one_line(lines), ""]
        if kind != "text" and parts and parts[-1].strip():
            parts.append("")
        parts += shown
    return "\n".join(parts)


def _one_line(lines: Sequence[str]) -> str:
    """A line end after a hyphen stays, for those who put divided words together."""
    joined = ""
    for line in filter(None, (" ".join(line.split()) for line in lines)):
        joined += ("\n" if joined.endswith("-") else " " if joined else "") + line
    return joined
