"""What a word is: one rule for retrieval, for the sifting of prompts and for measures of a text.

A word is a run of letters, digits and the marks on them, in lower case. Composed and decomposed
accents are one (NFC), and so are a ligature and its letters, a wide letter and a narrow one.
Unicode's compatibility form (NFKC) is not taken as a whole: it makes 105 of 10⁵ and 21 of 2½.
Scripts that put no space between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) have
no such runs: there each character with its marks counts as a word.

A single character says little in such a script, in Thai next to nothing. So a search compares
`terms`: the words, and each two and three characters of those scripts that stand side by side.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator

# Thai and Lao, Burmese, Khmer; then Japanese and Chinese with their further planes.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)


def _marks() -> str:
    """The combining marks as the inside of a character class; Python's `\\w` knows none of them."""
    ranges: list[list[int]] = []
    for code in range(0x300, min(sys.maxunicode, 0x1FFFF) + 1):
        if unicodedata.category(chr(code)).startswith("M"):
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


def _same_letters() -> dict[int, str]:
    """Ligatures to their letters, wide and narrow and positional forms to the usual ones."""
    forms = ("<wide>", "<narrow>", "<isolated>", "<initial>", "<medial>", "<final>")
    return {
        code: unicodedata.normalize("NFKC", chr(code))
        for code in range(0xFB00, 0xFFEF)
        if code <= 0xFB06 or unicodedata.decomposition(chr(code)).startswith(forms)
    }


_MARKS = _marks()
_SAME = _same_letters()
_WORD = re.compile(
    # One character of an unspaced script with its marks (Thai's vowel signs are letters as well).
    f"(?P<single>(?![{_MARKS}])[{_UNSPACED}][{_MARKS}]*)|(?:[^\\W_{_UNSPACED}][{_MARKS}]*)+"
)
_UNSPACED_SIGN = re.compile(f"[{_UNSPACED}\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f]")
_LONGEST_TERM = 3  # characters of an unspaced script


def words(text: str) -> list[str]:
    """The words of a text in order."""
    return [match.group() for match in _WORD.finditer(_plain(text))]


def terms(text: str) -> list[str]:
    """What a search compares: the words, and runs of two and three unspaced characters."""
    return list(_terms(text))


def normalised(text: str) -> str:
    """The words with single spaces between, and one at each end."""
    return f" {' '.join(words(text))} "


def is_unspaced(character: str) -> bool:
    """Is it of a script that puts no space between words, its full stops and commas included?"""
    return _UNSPACED_SIGN.match(character) is not None


def count_unspaced(text: str) -> int:
    """How many characters of a text are of such scripts."""
    return len(_UNSPACED_SIGN.findall(text))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).translate(_SAME).lower()


def _terms(text: str) -> Iterator[str]:
    row: list[str] = []  # the unspaced characters that end where the last match ended
    end = -1
    for match in _WORD.finditer(_plain(text)):
        yield match.group()
        if match.group("single") is None or match.start() != end:
            row = []
        if match.group("single") is not None:
            row = [*row[1 - _LONGEST_TERM :], match.group()]
            end = match.end()
        for size in range(2, len(row) + 1):
            yield "".join(row[-size:])
