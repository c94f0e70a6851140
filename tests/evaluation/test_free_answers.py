"""Is the right answer in a free answer, and does the answer repeat itself?"""

from __future__ import annotations

import pytest

from cartridge_distill.evaluation.free_answers import matches, matches_any, repeated_ngrams


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("She keeps two cats, as far as I know.", "two cats"),
        ("It was a Red Hat!", "the red hat"),  # case and articles
        ("The dose is 12,5 mg a day.", "12.5 mg"),
        ("Dose: 1,200 mg", "1200 mg"),
        ("He has one cat.", "cats"),  # a plural s of a word of four letters
        ("It is **E. coli**.", "E. coli"),
        ("Perhaps a car, perhaps a boat.", "boat"),  # lists are right: see the module
        ("她养了两只猫。", "两只猫"),
        ("Sicher 100 % davon", "100 %"),
        ("100%", "%"),
        ("It is in zone A, near the sea.", "Zone A"),  # no article
    ],
)
def test_right_answers(text: str, right: str) -> None:
    assert matches(text, right)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("", "two cats"),
        ("two dogs and three cats", "two cats"),  # the words must stand together
        ("The dose is 12.5 mg.", "12 mg"),
        ("The dose is 12.5.", "12"),
        ("category", "cat"),  # a part of a word is none
        ("cats two", "two cats"),
        ("她养了两只狗。", "两只猫"),
        ("100", "%"),
        ("It is in a zone near the sea.", "Zone A"),
        ("Zone B", "Zone A"),
    ],
)
def test_wrong_answers(text: str, right: str) -> None:
    assert not matches(text, right)


def test_one_of_several_wordings_will_do() -> None:
    assert matches_any("There are 7.", ("seven", "7"))
    assert not matches_any("There are 17.", ("seven", "7"))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3], (0, 0)),
        ([1, 2, 3, 4], (0, 1)),
        ([7] * 20, (16, 17)),
        ([1, 2, 3, 4, 1, 2, 3, 4], (1, 5)),
        (list(range(50)), (0, 47)),
    ],
)
def test_repeated_ngrams(ids: list[int], expected: tuple[int, int]) -> None:
    assert repeated_ngrams(ids) == expected
