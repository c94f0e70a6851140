"""Texts are cut on their structure, whole sentences each, and nothing of them is lost."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from cartridge_distill.data.documents.chunking import Chunk, chunk_text
from cartridge_distill.data.documents.fitting import Fitting
from cartridge_distill.data.documents.structure import (
    Strength,
    boundaries,
    first_heading,
    sections,
    sentences,
)
from cartridge_distill.util.errors import DocumentError
from tests.data.documents.made import prose, sentence

TEXT = """# Guide

## Harbour

The harbour is old. It has two piers, e.g. The long one; it was built
over ten years. "Is it safe?" Yes!

- first berth
- second berth. It is deep.

Opening Hours

Open from nine to five on all days.

Fares
-----

| who | fare |
| adult | 3 |

```
# no heading. Really
x = 1
```
"""


def count(text: str) -> int:
    return len(text.split())


def units(text: str) -> list[tuple[int, str]]:
    found = boundaries(text, "markdown")
    ends = [boundary.offset for boundary in found[1:]] + [len(text)]
    return [(b.strength, text[b.offset : end].strip()) for b, end in zip(found, ends, strict=True)]


def test_boundaries_and_their_strengths() -> None:
    assert units(TEXT) == [
        (Strength.SENTENCE, "It has two piers, e.g. The long one; it was built\nover ten years."),
        (Strength.SENTENCE, '"Is it safe?"'),
        (Strength.SENTENCE, "Yes!"),
        (Strength.PARAGRAPH, "- first berth"),
        (Strength.ITEM, "- second berth."),
        (Strength.SENTENCE, "It is deep."),
        (Strength.PLAIN_HEADING, "Opening Hours\n\nOpen from nine to five on all days."),
        (2, "Fares\n-----\n\n| who | fare |"),
        (Strength.ITEM, "| adult | 3 |"),
        (Strength.PARAGRAPH, "```"),
        (Strength.ITEM, "# no heading. Really"),
        (Strength.ITEM, "x = 1"),
        (Strength.ITEM, "```"),
    ]


def test_sections_sentences_and_title() -> None:
    assert [heading for heading, _, _ in sections(TEXT, "markdown")] == [
        "Harbour",
        "Opening Hours",
        "Fares",
    ]
    assert all(TEXT[start:end].strip() for _, start, end in sections(TEXT, "markdown"))
    assert sentences(TEXT, "markdown")[:3] == [
        "The harbour is old.",
        "It has two piers, e.g. The long one; it was built over ten years.",
        '"Is it safe?"',
    ]
    assert "x = 1" not in " ".join(sentences(TEXT, "markdown")) and "fare" not in " ".join(
        sentences(TEXT, "markdown")
    )
    assert (
        first_heading(TEXT, "markdown") == "Guide"
        and first_heading("Plain. Text.", "markdown") is None
    )


def test_other_scripts() -> None:
    assert sentences("これは文です。これも文です。", "plain") == [
        "これは文です。",
        "これも文です。",
    ]
    assert sentences("Мост открыт. Он длинный.", "plain") == ["Мост открыт.", "Он длинный."]
    assert sentences("Es ist z.B. der Fall. Über alles.", "plain") == [
        "Es ist z.B. der Fall.",
        "Über alles.",
    ]


def check(text: str, chunks: list[Chunk], budget: int) -> None:
    """What holds for every cut."""
    ends = {0} | {boundary.offset for boundary in boundaries(text, "markdown")} | {len(text)}
    at = 0
    for chunk in chunks:
        assert chunk.text == text[chunk.start : chunk.end] == chunk.text.strip() != ""
        assert not text[at : chunk.start].strip(), "a piece is missing"
        assert count(chunk.text) <= budget
        at = chunk.end
    assert not text[at:].strip()
    for before, after in pairwise(chunks):
        if not before.torn:
            assert any(before.end <= end <= after.start for end in ends), "cut mid-sentence"


@pytest.mark.parametrize("budget", [12, 30, 47, 200, 10_000])
def test_whole_sentences_within_the_budget_and_nothing_lost(budget: int) -> None:
    text = "\n\n".join(f"## Part {n}\n\n{prose(17, n * 17)}" for n in range(12))
    chunks = chunk_text(text, budget, count, "markdown")
    check(text, chunks, budget)
    # A heading has three words, a sentence eleven: nothing else is longer than twelve.
    assert [chunk.torn for chunk in chunks] == [budget == 12 and "##" in c.text for c in chunks]
    if 12 < budget < 10_000:
        # The last but one can be cut short for what follows to be whole; all others are half full.
        assert all(count(chunk.text) >= budget // 2 - 10 for chunk in chunks[:-2])
    if budget == 10_000:
        assert len(chunks) == 1


def test_the_strongest_place_in_the_second_half_is_taken() -> None:
    text = f"{prose(6)}\n\n# Second\n\n{prose(9, 6, 3)}"
    first, second = chunk_text(text, 110, count, "markdown")
    assert second.text.startswith("# Second")
    # Without a heading there, the paragraph.
    first, second = chunk_text(text.replace("# Second\n\n", ""), 104, count, "markdown")
    assert first.text.endswith(sentence(8)) and second.text.startswith(sentence(9))


def test_a_heading_stays_with_what_it_stands_over() -> None:
    text = "\n\n".join(f"# Part {n}\n\n## Only\n\n{sentence(n)}" for n in range(40))
    for chunk in chunk_text(text, 64, count, "markdown"):
        assert chunk.text.startswith("# Part") and chunk.text.endswith("debate.")


def test_a_sentence_beyond_the_budget_is_cut_and_says_so() -> None:
    lines = "\n".join(f"value {n} is {n * n}" for n in range(30))
    chunks = chunk_text(f"Short one.\n\n{lines}\n\nLast one.", 20, count, "markdown")
    check(f"Short one.\n\n{lines}\n\nLast one.", chunks, 20)
    assert [chunk.torn for chunk in chunks][:2] == [False, True]
    assert all(chunk.text.startswith("value") for chunk in chunks[1:-1]), "cut at line ends"
    words = chunk_text("word " * 100, 20, count, "markdown")
    assert [count(chunk.text) for chunk in words] == [20] * 5
    letters = chunk_text("x" * 100, 30, len, "markdown")
    assert [chunk.text for chunk in letters] == ["x" * 30] * 3 + ["x" * 10]
    assert [chunk.torn for chunk in letters] == [True] * 3 + [False]


def test_random_texts_are_cut_without_loss() -> None:
    rng = random.Random(0)
    pieces = [
        "# H\n",
        "\n\n",
        "A b c. ",
        "d e\n",
        "- x y\n",
        "```\n",
        "| t |\n",
        "  ",
        "F? ",
        "==\n",
    ]
    for _ in range(300):
        text = "w" + "".join(rng.choices(pieces, k=rng.randrange(1, 60)))
        budget = rng.randrange(2, 25)
        check(text, chunk_text(text, budget, count, "markdown"), budget)


def test_a_long_text_is_tokenised_a_few_times_only() -> None:
    """The work: characters counted, in multiples of the text."""
    text = prose(6000)  # 200 pages
    measured = 0

    def counting(piece: str) -> int:
        nonlocal measured
        measured += len(piece)
        return count(piece)

    chunks = chunk_text(text, 700, counting, "markdown")
    assert len(chunks) > 80
    assert measured < 20 * len(text)


@pytest.mark.parametrize(
    "unit", ["plain words and more ", "abcdefgh", "世界和平发展人民", "a" + " " * 99]
)
def test_a_long_line_without_a_full_stop_is_cut_in_linear_work(unit: str) -> None:
    """The work: characters measured, in multiples of the text; the same for any length of it."""
    ratios = []
    for size in (40_000, 160_000):
        text = unit * (size // len(unit))
        measured = 0

        def counting(piece: str) -> int:
            nonlocal measured
            measured += len(piece)
            return len(piece) // 3

        chunks = chunk_text(text, 500, counting, "plain")
        assert max(counting(chunk.text) for chunk in chunks) <= 500
        assert "".join("".join(chunk.text for chunk in chunks).split()) == "".join(text.split())
        ratios.append(measured / len(text))
    assert max(ratios) < 20 and ratios[1] < 1.2 * ratios[0]


def test_a_piece_is_as_large_as_the_budget_allows() -> None:
    """Against every place, tried one by one."""
    rng = random.Random(2)
    for _ in range(60):
        text = " ".join("x" * rng.randrange(1, 30) for _ in range(rng.randrange(1, 200)))
        ends = [at + 1 for at, char in enumerate(text) if char == " "] + [len(text)]
        budget = rng.randrange(1, 80)
        fitting = Fitting(lambda start, end, text=text: len(text[start:end].split()), budget)
        first = 0
        while first < len(ends):
            start = ends[first - 1] if first else 0
            best = max(n for n in range(first, len(ends)) if n - first < budget)
            assert fitting.furthest(start, ends, first) == best
            first = best + 1


def test_refusals() -> None:
    with pytest.raises(DocumentError, match="empty"):
        chunk_text("  \n", 10, count, "markdown")
    with pytest.raises(DocumentError, match="budget of 5 tokens is too small"):
        chunk_text("Some text.", 5, lambda text: len(text) + 9, "markdown")
