"""How much of a document can become prompts, and what the rest of it is.

A prompt is made of a sentence of some words; headings, code, table rows and shorter lines are none.
A small share is no error: a reference of commands has little prose. But it is said, because a
document that was read by the wrong rules looks like that, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from cartridge_distill.data.documents.blocks import Form
from cartridge_distill.data.documents.quality import measure
from cartridge_distill.data.documents.structure import pieces
from cartridge_distill.data.words import words

FEWEST_WORDS = 3  # of a sentence in a file, where page numbers and captions stand around
SMALL = 0.5  # of a document: less is warned of
_NAMED = 0.01
_SAID = {
    "code": "code",
    "heading": "headings",
    "table": "table rows",
    "short": f"lines of less than {FEWEST_WORDS} words",
    "head": "the record's head and the names of its sections",
}


@dataclass(frozen=True)
class Usable:
    """Shares of a document's characters, white space aside.

    Attributes:
        share: what stands in sentences that prompts can be made of.
        rest: what the others are: kind -> share.
        stretches: how many of the sentences are parts of one that is too long for a prompt.
        characters: all of them, white space included.
        word_length: mean, in letters; 0 in a script without spaces between words.
        faults: of its words, as `quality` finds them.
    """

    share: float
    rest: dict[str, float]
    stretches: int
    characters: int
    word_length: float
    faults: tuple[str, ...]

    def line(self) -> str:
        """What it says about the document."""
        said = f"{self.characters} characters, {self.share:.0%} can become prompts"
        rest = [f"{share:.0%} {_SAID[kind]}" for kind, share in self.rest.items() if share > _NAMED]
        said += f" ({', '.join(rest)})" if rest else ""
        if self.word_length:
            said += f"; words of {self.word_length:.1f} letters"
        if self.stretches:
            said += f"; {self.stretches} stretches of sentences too long for a prompt"
        return said

    def warnings(self) -> list[str]:
        """What a user should look at before training on it."""
        found = [*self.faults]
        if self.share < SMALL:
            found.append(
                f"only {self.share:.0%} of it can become prompts: see its text in documents.jsonl"
            )
        return found


def usable(text: str, form: Form) -> Usable:
    """Measures a document."""
    counts: Counter[str] = Counter()
    stretches = 0
    for piece in pieces(text, form):
        said = text[piece.start : piece.end]
        kind = piece.kind
        if kind == "sentence" and len(words(said)) < FEWEST_WORDS:
            counts["short"] += _size(said)
        else:
            counts[kind] += _size(said)
        stretches += piece.stretch
    return _measured(text, counts, stretches)


def usable_in_record(text: str, sentences: Iterable[str]) -> Usable:
    """The same for a record, whose prompts are made of these sentences, however short they are."""
    said = sum(map(_size, sentences))
    return _measured(text, Counter(sentence=said, head=_size(text) - said), 0)


def _measured(text: str, counts: Counter[str], stretches: int) -> Usable:
    quality = measure(text)
    total = max(1, counts.total())
    rest = {kind: count / total for kind, count in counts.most_common() if kind != "sentence"}
    return Usable(
        *(counts["sentence"] / total, rest, stretches, len(text)),
        *(quality.word_length, quality.faults),
    )


def _size(text: str) -> int:
    return sum(map(len, text.split()))
