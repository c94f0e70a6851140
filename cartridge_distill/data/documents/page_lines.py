"""The pages of a PDF, or of a text with form feeds, to one text: without what belongs to pages.

Taken out: page numbers (a number whose distance from the count of pages is the same on several
pages), running heads (a line at the top or the foot of a page that stands there on several, or
before its "4 / 57", or as TeX sets the heads of a book: "CHAPTER 4. SIMPLE EXAMPLE"), and
lines of contents ("Harbours . . . . 12"). Put together: words that were divided at a line end.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_SEVERAL = 3  # pages
_OFTEN = 0.25  # of all pages: for heads whose words change and whose page number goes on
_WITH_WORDS = "with words"
_EDGE = 2  # lines at the top and at the foot of a page that may be heads
# Dots and a number, or so many dots that they are no end of a sentence.
_LEADERS = re.compile(
    r"(?:(?:[ \t]?\.){4,}|(?:[ \t]\.){2,}|…{2,})[ \t]*(?:\d+|[ivxlc]+)[ \t]*$"
    r"|(?:[ \t]?\.){12,}[ \t]*$"
)
_NUMBER = re.compile(r"^\W*(\d{1,4})\b\W*|\W*\b(\d{1,4})\W*$")
_ROMAN = re.compile(r"^\W*[ivxlcdm]+\W*$")
_BOOK_HEAD = re.compile(r"^(?:\w+ \d{1,2}|\d{1,2}(?:\.\d{1,2})+)\. \S")
_OF_PAGES = re.compile(r"\d{1,4}\s*(?:/|of|von|van|de|di|sur|из)\s*\d{1,4}\W*$", re.I)
_PAGE_OF = re.compile(
    r"^\W*(?:page|seite|página|pagina|стр\.?)\s*\d+(?:\s*\W\s*\d+|\s+\w+\s+\d+)?\W*$", re.I
)
_DIVIDED = re.compile(r"([^\W\d_]+)[-\u2010\u00ad][ \t]*\n[ \t]*([^\W\d_]+)")
_LIGATURES = dict(zip(range(0xFB00, 0xFB07), "ff fi fl ffi ffl st st".split(), strict=True))


def text_of_pages(pages: Sequence[str], divided: bool = True) -> str:
    """One text: a blank line between pages, none where a sentence goes on over the page.

    Args:
        pages: the text of each.
        divided: a hyphen at a line's end divides a word, unless the text shows otherwise.
    """
    cleaned = _without_heads([page.strip("\n").splitlines() for page in pages])
    pages = ["\n".join(_without_leaders(lines)) for lines in cleaned]
    return joined_words(_join(pages), always=divided)


def joined_words(text: str, always: bool = True) -> str:
    """With words put together that a line end divides, and without soft hyphens.

    Args:
        text: the text.
        always: put parts together unless the text has them with a hyphen elsewhere. Otherwise
            only where the text has the whole word elsewhere, too.
    """
    if _DIVIDED.search(text) is None:
        return text.replace("\u00ad", "")
    whole = Counter(re.findall(r"[^\W\d_]+(?:[-\u2010][^\W\d_]+)*", text.lower()))

    def put_together(match: re.Match[str]) -> str:
        first, second = match.groups()
        with_hyphen = whole[f"{first}-{second}".lower()] + whole[f"{first}\u2010{second}".lower()]
        without = whole[f"{first}{second}".lower()]
        sign = match.group()[len(first)]
        if sign == "\u00ad":
            return first + second
        if with_hyphen > without or second[0].isupper() or first.isupper():
            return f"{first}-{second}"
        # U+2010 at a line's end is typeset: it divides a word, as typed hyphens may not.
        return first + second if always or without or sign == "\u2010" else match.group()

    return _DIVIDED.sub(put_together, text).replace("\u00ad", "")


def plain_letters(text: str) -> str:
    """Without what fonts leave behind: ligatures, null characters, halves of surrogate pairs."""
    text = text.translate(_LIGATURES).replace("\x00", "").replace("\u200b", "")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _without_leaders(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if not _LEADERS.search(line)]


def _edges(lines: Sequence[str]) -> list[int]:
    """The numbers of the first and last lines of a page that are not blank."""
    said = [number for number, line in enumerate(lines) if line.strip()]
    return sorted({*said[:_EDGE], *said[-_EDGE:]}) if len(said) > 2 * _EDGE else said


def _without_heads(pages: Sequence[list[str]]) -> list[list[str]]:
    """Pages of several are needed to tell a head; a shorter text is left as it is."""
    seen: Counter[tuple[str, str]] = Counter()
    found: list[dict[int, set[tuple[str, str]]]] = []
    for count, lines in enumerate(pages):
        marks = {number: _marks(lines[number], count) for number in _edges(lines)}
        seen.update({mark for some in marks.values() for mark in some})
        found.append(marks)
    many = max(_SEVERAL, _OFTEN * len(pages))
    left = []
    for lines, marks in zip(pages, found, strict=True):
        drop = {
            number
            for number, some in marks.items()
            if any(seen[mark] >= (many if mark[1] == _WITH_WORDS else _SEVERAL) for mark in some)
        }
        left.append([line for number, line in enumerate(lines) if number not in drop])
    return left


def _marks(line: str, count: int) -> set[tuple[str, str]]:
    """What a line would have in common with the heads of other pages.

    Its words; and, where it holds a number of its own at one end, its distance from the page's
    count. A line that has more words than a head is none.
    """
    said = " ".join(line.split())
    if not said or len(said) > 120:
        return set()
    if _PAGE_OF.match(said):
        return {("page", "")}
    if _ROMAN.match(said):
        return {("roman", "")}
    marks = set()
    number = _NUMBER.search(said)
    if number:
        distance = int(number.group(1) or number.group(2)) - count
        rest = (said[: number.start()] + said[number.end() :]).strip()
        marks.add((f"number {distance}", _WITH_WORDS if rest else ""))
        if not rest:
            return marks
    if _BOOK_HEAD.match(said) and said.isupper():
        marks.add(("book", ""))
    if said[-1] not in ".!?;,:。！？；，：" and any(char.isalpha() for char in said):
        marks.add(("words", said))
    if of_pages := _OF_PAGES.search(said):
        marks.add((f"of pages {said[: of_pages.start()]}", _WITH_WORDS))
    return marks


def _join(pages: Sequence[str]) -> str:
    joined = ""
    for text in (text.strip("\n").rstrip() for text in pages if text.strip()):
        goes_on = joined and joined[-1] not in ".!?:;" and text.lstrip()[0].islower()
        joined += ("\n" if goes_on else "\n\n") * bool(joined) + text
    return joined
