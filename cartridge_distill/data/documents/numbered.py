"""Numbered headings of a plain text: lines like "3.2 Rules of the harbour" whose numbers go on.

Text out of a PDF has no marks of headings: they stand on a line of their own, directly over what
follows, and would become the beginning of its first sentence. A number at the beginning of a line
proves little ("3.2 metres were measured"). So a line counts only if its number has two parts or
more and continues the ones before: it is the next section, the first one below it, or the next of
an outer one; a few may be missing. Less than three such lines in a text are none.

Lines of contents look the same. They stand directly under each other, or the same number and words
come again further down; then the last of them is the heading.

Not done here: headings with one number ("3 Rules"), which cannot be told from the items of a list.
"""

from __future__ import annotations

import re
from itertools import pairwise

from cartridge_distill.data.words import normalised

_LINE = re.compile(
    r"^[ \t]{0,3}(\d{1,2}(?:\.\d{1,3}){1,4})\.?[ \t]+(\S[^\n]{0,98})$(?=\n|\Z)", re.M
)
_ENDS_NO_TITLE = (*".,;:", "。", "，", "、", "；", "：")
_SKIPPED = 3  # headings that may be missing in between: of two lines, or read badly
_FEWEST = 3
_CONTENTS = 3  # so many under each other are a list of contents
_DEEPEST = 5
_ALIKE = 14  # letters


def numbered_headings(text: str) -> dict[int, tuple[int, str]]:
    """Offset of the line -> (depth, the heading with its number)."""
    lines = [found for found in _LINE.finditer(text) if _is_title(found.group(2))]
    follows = [
        not text[one.end() : two.start()].strip() and _number(one) < _number(two)
        for one, two in pairwise(lines)
    ]
    again = {_key(found): place for place, found in enumerate(lines)}
    accepted: dict[int, tuple[int, str]] = {}
    last: tuple[int, ...] = ()
    for place, found in enumerate(lines):
        if _in_contents(follows, place) or again[_key(found)] != place:
            continue
        number = _number(found)
        if _continues(last, number):
            last = number
            title = " ".join(found.group().split())
            accepted[found.start()] = (min(_DEEPEST, len(number)), title)
    return accepted if len(accepted) >= _FEWEST else {}


def _number(found: re.Match[str]) -> tuple[int, ...]:
    return tuple(map(int, found.group(1).split(".")))


def _is_title(said: str) -> bool:
    first = next((char for char in said if char.isalpha()), "a")
    return not first.islower() and not said.rstrip().endswith(_ENDS_NO_TITLE)


def _key(found: re.Match[str]) -> tuple[str, str]:
    """What a line of contents and its heading have in common: the title may go on there."""
    return found.group(1), normalised(found.group(2))[:_ALIKE]


def _in_contents(follows: list[bool], place: int) -> bool:
    """Is this line one of several that stand directly under each other?"""
    first = last = place
    while first and follows[first - 1]:
        first -= 1
    while last < len(follows) and follows[last]:
        last += 1
    return last - first + 1 >= _CONTENTS


def _continues(last: tuple[int, ...], number: tuple[int, ...]) -> bool:
    """May a heading with this number come after one with the last?"""
    if not last:
        return number[1:] == (1,) * (len(number) - 1)
    for place, (before, now) in enumerate(zip(last, number, strict=False)):
        if before != now:
            inner = number[place + 1 :]
            return 0 < now - before <= _SKIPPED and all(part <= _SKIPPED for part in inner)
    return len(number) > len(last) and all(part <= _SKIPPED for part in number[len(last) :])
