"""What can be told of a free answer from its text and its tokens: is it right, does it repeat?

``generated_match``: the words of the right answer stand in the free answer, one after the other.
Words are compared as :mod:`.named_option` compares them: case, punctuation, articles and a plural s
make no difference, numbers do ("12,5" and "12.5" are one number, "12" and "12.5" are not). In
scripts that put no space between words each character is a word. An answer that says more is right
all the same, also one that names other options besides; who must not be fooled by a list of the
options asks for ``generated_accuracy``. An answer in other words is wrong, and so is one that was
cut off before it came to the point. A question may name several wordings; one of them will do.

Repetition is seq-rep-4 (Welleck et al., arXiv 1908.04319): the part of the 4-grams of tokens that
stood in the answer before. A text of n tokens has n - 3 of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from cartridge_distill.data.words import count_unspaced, words
from cartridge_distill.evaluation.named_option import compared_words, ends_in_article

NGRAM = 4


def matches(text: str, right: str) -> bool:
    """Is the right answer contained in a free answer, by the rule of the module?"""
    rule: Callable[[str], list[str]] = words if count_unspaced(right) else compared_words
    if ends_in_article(right):  # "zone A": no article ends a text, and without it "zone" is left
        rule = partial(compared_words, articles=True)
    inside, looked_for = rule(text), rule(right)
    if not looked_for:  # "%", or an article: nothing that could be compared as words
        return right.strip().casefold() in text.casefold()
    size = len(looked_for)
    return any(inside[at : at + size] == looked_for for at in range(len(inside) - size + 1))


def matches_any(text: str, wordings: Sequence[str]) -> bool:
    """Is one of the wordings of the right answer contained in a free answer?"""
    return any(matches(text, right) for right in wordings)


def repeated_ngrams(ids: Sequence[int]) -> tuple[int, int]:
    """(n-grams that stood there before, all n-grams)."""
    found = [tuple(ids[at : at + NGRAM]) for at in range(len(ids) - NGRAM + 1)]
    return len(found) - len(set(found)), len(found)
