"""Where a sentence ends.

At `.`, `!` or `?` (or the full stop of another script) before white space and anything but a
lower-case letter or a digit; titles, initials and common abbreviations end none. In scripts
without spaces the full stop alone is enough, with the closing quotes and brackets behind it; in
Thai, which has no full stop, a space ends a clause. When in doubt there is no end: a missed end
costs a longer piece, a wrong one a torn sentence.
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
    r"|(?<=[\u0e00-\u0e7f])\s+(?=[\u0e00-\u0e7f])"
)


def sentence_starts(text: str) -> list[int]:
    """Offsets at which the second and further sentences of a piece of prose begin."""
    ends = (match.end() for match in _SENTENCE_END.finditer(text))
    return [end for end in ends if not text[end].islower()]
