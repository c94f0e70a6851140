"""One rule for words, in every script."""

from __future__ import annotations

import pytest

from cartridge_distill.data.words import normalised, terms, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Die Größe des 橋は、いつ?", ["die", "größe", "des", "橋", "は", "い", "つ"]),
        ("ﬁnd the ＡＢＣ", ["find", "the", "abc"]),
        ("Cafe\u0301 under_score", ["café", "under", "score"]),
        ("10⁵ is not 105, 2½ not 21", ["10⁵", "is", "not", "105", "2½", "not", "21"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ไทย", ["ไ", "ท", "ย"]),
        ("ភាសា 中文", ["ភា", "សា", "中", "文"]),
        ("한국어 문장", ["한국어", "문장"]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected
    assert normalised(text) == f" {' '.join(expected)} "


def test_terms_are_words_and_runs_of_unspaced_characters() -> None:
    assert terms("東京都 ab cd") == ["東", "京", "東京", "都", "京都", "東京都", "ab", "cd"]
    assert terms("東、京") == ["東", "京"]  # not side by side
    assert terms("Two words") == words("Two words")
