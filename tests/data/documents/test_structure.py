"""Each kind of text is read by its own rules, and what cannot become a prompt is said."""

from __future__ import annotations

import pytest

from cartridge_distill.data.documents.blocks import Form, blocks
from cartridge_distill.data.documents.structure import (
    LONGEST_SENTENCE,
    line_sentences,
    sections,
    sentences,
    shortened,
)
from cartridge_distill.data.documents.usable import usable
from cartridge_distill.util.errors import DocumentError
from tests.data.documents.made import prose

CARE = "Care\n~~~~\n\nOil the axle each spring.\n"


def headings(text: str, form: Form) -> list[tuple[int, str]]:
    return [(block.depth, block.title) for block in blocks(text, form) if block.depth]


def test_an_underline_of_any_sign_makes_a_heading_in_plain_text_and_no_code() -> None:
    assert headings(CARE, "plain") == [(1, "Care")]
    assert sentences(CARE, "plain") == ["Oil the axle each spring."]
    assert sections(CARE, "plain")[0][0] == "Care"
    assert sentences(CARE, "markdown") == []  # there it is a fence, which nothing closes


def test_underlines_have_the_depth_of_their_first_appearance() -> None:
    text = (
        "====\nBook\n====\n\nOne\n---\nText of one.\n\nTwo\n~~~\n\nText.\n\nThree\n-----\n\nText."
    )
    assert headings(text, "plain") == [(1, "Book"), (2, "One"), (3, "Two"), (2, "Three")]
    assert sentences(text, "plain")[0] == "Text of one."


@pytest.mark.parametrize(
    "text",
    [
        "# apt install the package\n\nIt asks for a password.",
        "$ Make all of it\n\nIt takes a while.",
        "```\nquoted like this\n\nAnd it goes on without an end.",
        "    Indented like a manual page.\n\n    It is prose all the same.",
        "-----\n$ git clone\n-----\n\nIt makes a copy.",
        "------------------------------------\nHEAD is now at\n"
        "------------------------------------\n\nIt shows a line.",
        "name   age\n----------\nAnn    40",
    ],
)
def test_what_is_no_heading_and_no_code_in_plain_text(text: str) -> None:
    assert headings(text, "plain") == []
    assert not any(block.code for block in blocks(text, "plain"))


def test_capitals_over_indented_lines_are_a_manual_pages_heading() -> None:
    text = "NAME\n       ls - list the directory\n\nSEE ALSO\n       find(1), tree(1)\n"
    assert headings(text, "plain") == [(6, "NAME"), (6, "SEE ALSO")]
    assert headings("IBM\nmade the first of them.", "plain") == []


def test_fences_and_indented_code_in_markdown() -> None:
    text = (
        "# A\n\n````\n```\ninner\n```\n````\n\nProse after it. ```x``` is inline.\n\n"
        "    indented code\n\n- an item\n\n    its second paragraph\n\nLast one here."
    )
    code = [text[b.start : b.end] for b in blocks(text, "markdown") if b.code]
    assert code == ["````\n```\ninner\n```\n````\n", "    indented code\n"]
    assert "its second paragraph" in sentences(text, "markdown")
    assert sentences("```a``` begins a line.\n\nAnother one.", "markdown") == [
        "```a``` begins a line.",
        "Another one.",
    ]


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(DocumentError, match="'rst' is unknown; fix: one of markdown, plain"):
        blocks("Text.", "rst")  # type: ignore[arg-type]


def test_a_hash_line_of_any_length_costs_no_more_than_its_length() -> None:
    """A pattern that goes back and forth over such a line would never end."""
    assert headings("# " + "#" * 300_000 + "x", "markdown")[0][0] == 1


@pytest.mark.parametrize("text", ["word " * 3000, "x" * 12_000, "这是一个没有句号的长文本" * 800])
def test_a_long_sentence_gives_stretches(text: str) -> None:
    for found in (sentences(text, "plain"), shortened(line_sentences(text))):
        assert len(found) > 5 and max(map(len, found)) <= LONGEST_SENTENCE
        assert "".join("".join(found).split()) == "".join(text.split())
    measured = usable(text, "plain")
    assert measured.stretches == len(sentences(text, "plain"))
    assert "too long for a prompt" in measured.line()


def test_stretches_end_at_commas_where_there_are_some() -> None:
    found = sentences("one two three four, " * 200, "plain")
    assert all(stretch.endswith("four,") for stretch in found)


def test_sentences_of_other_scripts_end_where_they_end() -> None:
    assert sentences("「行きます。」と言った。次の文。", "plain") == [
        "「行きます。」",
        "と言った。",
        "次の文。",
    ]
    assert sentences("本当？！はい。", "plain") == ["本当？！", "はい。"]
    assert len(sentences("पुल खुला है। वह लंबा है।", "plain")) == 2
    assert len(sentences("سڑک کھلی ہے۔ وہ لمبی ہے۔", "plain")) == 2
    assert len(sentences("สะพานเปิดแล้ว ยาวกว่าที่คิด", "plain")) == 2


def test_the_share_that_can_become_prompts_and_what_the_rest_is() -> None:
    code = "x = compute(1)\n" * 60
    text = f"# Title here\n\n{prose(4)}\n\n```\n{code}```\n\n| a | b |\n\nShort.\n"
    found = usable(text, "markdown")
    assert 0.2 < found.share < 0.5
    assert set(found.rest) == {"code", "heading", "table", "short"}
    assert "% code" in found.line() and "letters" in found.line()
    assert "can become prompts" in found.warnings()[0]
    assert usable(prose(20), "plain").warnings() == []
    assert usable(prose(20), "plain").share == 1.0
