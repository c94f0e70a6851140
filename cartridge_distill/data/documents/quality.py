"""How a text reads, by its words alone: are they words, and how long are they?

Text that came out of a file is not yet text that was read: a PDF's fonts may lose the spaces
between words, or the letters. These measures know no language. They are meant for text of spaced
scripts; where most letters are of a script without spaces, a word has no length to measure.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from cartridge_distill.data.words import count_unspaced

_LETTERS = re.compile(r"[^\W\d_]+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # names in code are no words
_ALPHANUMERIC = re.compile(r"[^\W_]")
_STRANGE = re.compile(r"[\ufffd\ue000-\uf8ff]|\(cid:\d+\)")
_WORDS = re.compile(r"[^\W\d_]+|[^\w\s]|\d+")  # signs part words; what they part is not torn
_FREQUENT = 0.004  # of all words: "a", "in", "de"
_TORN = 0.004
_LONG = 20  # letters; German's longest are seldom more
_ENOUGH = 50  # words; fewer tell nothing
_UNSPACED = 0.3  # of all letters; more, and words are not measured


@dataclass(frozen=True)
class Quality:
    """Measures of a text.

    Attributes:
        words: runs of letters.
        word_length: their mean, in letters; 0 where the script puts no spaces.
        long_words: the share of the letters that stand in words of more than 20 letters.
        letters: the share of the characters that are letters or digits, white space aside.
        strange: the share of the characters that stand for none: replacement signs, private ones.
        torn: the share of the words that are a part of a word of this text, beside its other part
            ("ho w", where "how" is a word of it): readers of a PDF take kerning for a space.
    """

    words: int
    word_length: float
    long_words: float
    letters: float
    strange: float
    torn: float

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with it, in words; nothing for a text that reads well."""
        found = []
        if self.strange > 0.01:
            found.append(f"{self.strange:.0%} of its characters are no letters that are known")
        if self.letters < 0.5:
            found.append(f"only {self.letters:.0%} of its characters are letters or digits")
        if self.words < _ENOUGH or not self.word_length:
            return tuple(found)
        if self.long_words > 0.15:
            found.append(
                f"{self.long_words:.0%} of its letters stand in words of more than {_LONG}: "
                "words are glued together"
            )
        elif self.word_length > 10:
            found.append(f"its words have {self.word_length:.1f} letters: they may be glued")
        if self.torn > _TORN:
            found.append(f"{self.torn:.1%} of its words are torn apart")
        if self.word_length < 2.5:
            found.append(f"its words have {self.word_length:.1f} letters: they may be torn apart")
        return tuple(found)

    @property
    def badness(self) -> float:
        """0 for a good text; for the choice between two readings of one file."""
        apart = max(0.0, self.word_length - 7, 3.5 - self.word_length if self.word_length else 0)
        words = self.long_words + 20 * self.torn + apart / 4
        return words + 4 * self.strange + max(0.0, 0.6 - self.letters)


def measure(text: str) -> Quality:
    """The measures of a text; a text without any character has the letters of none."""
    characters = sum(map(len, text.split()))
    letters = len(_ALPHANUMERIC.findall(text))
    # Letters with marks (Hindi's vowels) are longer than runs of letters say, but not glued.
    lengths = [len(word) for word in _LETTERS.findall(_CAMEL.sub(" ", text))]
    total = sum(lengths)
    spaced = count_unspaced(text) <= _UNSPACED * max(1, total)
    return Quality(
        words=len(lengths),
        word_length=total / len(lengths) if lengths and spaced else 0.0,
        long_words=sum(n for n in lengths if n > _LONG) / total if total and spaced else 0.0,
        letters=letters / characters if characters else 0.0,
        strange=sum(len(found) for found in _STRANGE.findall(text)) / max(1, characters),
        torn=_torn(text) if spaced else 0.0,
    )


def _torn(text: str) -> float:
    """See :class:`Quality`. A part has one or two letters, and is no frequent word by itself."""
    found = _WORDS.findall(text.lower())
    whole = Counter(found)
    parts = 0
    for one, two in pairwise(found):
        short, other = sorted((one, two), key=len)
        joined = one + two
        if len(short) <= 2 and len(joined) >= 3 and whole[joined] > max(1, whole[other]):
            parts += whole[short] <= _FREQUENT * len(found)
    return parts / max(1, len(found))
