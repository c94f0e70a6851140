"""Where a sentence ends.

At `.`, `!` or `?` (or the full stop of another script) before white space and anything but a
lower-case letter or a digit; titles, initials and common abbreviations end none. In scripts
without spaces the full stop alone is enough, with the closing quotes and brackets behind it; in
Thai, which has no full stop, a space ends a clause. When in doubt there is no end: a missed end
costs a longer piece, a wrong one a torn sentence.

The number of an item or a heading at the beginning of a line ("1. Free", "2.1. Areas") ends none,
and neither does the ordinal before a month ("3. Oktober").
"""

from __future__ import annotations

import re

_ABBREVIATIONS = (
    *("Dr", "Mr", "Mrs", "Ms", "Prof", "St", "[A-Z]"),
    *("Fig", "Figs", "No", "Nos", "Sec", "Vol", "pp", "vs", "cf", "al", "etc", "approx"),
    *("Inc", "Ltd", "Co", "Jr", "Sr", r"e\.g", r"i\.e"),
)
_NO_END = "".join(rf"(?<!\b{word}\.)" for word in _ABBREVIATIONS)
_CLOSERS = "」』”’）】》〉\"')"
_SENTENCE_END = re.compile(
    # Arabic and Urdu, Hindi, Armenian and Ethiopic full stops stand before a space as ours do.
    rf"(?<=[.!?…؟۔।॥։።]){_NO_END}[\"')\]”’»]*\s+(?=[^\W\d_]|[\"'(\[“‘«¿¡])"
    rf"|(?<=[。！？｡។။])[{_CLOSERS}]*\s*(?=[^\s。！？｡{_CLOSERS}])"
    rf"|(?<=．)[{_CLOSERS}]*\s*(?=[^\s\d０-９。！？｡．{_CLOSERS}])"
    r"|(?<=[\u0e00-\u0e7f])\s+(?=[\u0e00-\u0e7f])"
)
_NUMBER = re.compile(r"\s*(?:\W{1,2}\s*)?(?:\d{1,3}(?:\.\d{1,3})*|[ivxIVX]{1,4})\.")
_LONGEST_NUMBER = 40  # characters, white space before it included
_ORDINAL = re.compile(r"(?<!\d)\d{1,2}\.$")
_MONTH = re.compile(
    r"(?:Jan|Jän|Feb|Mär|März|Apr|Mai|Maj|Juni?|Juli?|Aug|Sep|Okt|Nov|De[zsc]|Jahrhundert)"
)


def sentence_starts(text: str) -> list[int]:
    """Offsets at which the second and further sentences of a piece of prose begin."""
    return [
        match.end()
        for match in _SENTENCE_END.finditer(text)
        if not text[match.end()].islower() and not _is_number(text, match.start(), match.end())
    ]


def _is_number(text: str, end: int, after: int) -> bool:
    """Does the full stop in front of `end` belong to a number, before what begins at `after`?"""
    first = max(0, end - _LONGEST_NUMBER)  # a line may be as long as a book
    line = text[first:end].rpartition("\n")
    if (line[1] or not first) and _NUMBER.fullmatch(line[2]):
        return True
    return _MONTH.match(text, after) is not None and _ORDINAL.search(line[2]) is not None
