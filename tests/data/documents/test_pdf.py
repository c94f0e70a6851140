"""A PDF's text is measured, the reader that makes words of it is taken, pages leave no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
from reportlab.lib.styles import getSampleStyleSheet
from reportlab.platypus import Paragraph, SimpleDocTemplate

from cartridge_distill.data.documents.page_lines import joined_words, plain_letters, text_of_pages
from cartridge_distill.data.documents.pdf import read_pdf
from cartridge_distill.data.documents.quality import measure
from cartridge_distill.util.errors import DocumentError
from tests.data.documents.made import prose, sentence, write_glued_pdf, write_pdf

LINES = [sentence(number) for number in range(40)]


def test_glued_words_are_read_by_the_second_reader(tmp_path: Path) -> None:
    write_glued_pdf(tmp_path / "a.pdf", LINES, gap=0.25)
    found = read_pdf((tmp_path / "a.pdf").read_bytes(), "a.pdf")
    assert found.text.split() == " ".join(LINES).split()
    assert "read by PDFium" in found.notes[1]


def test_a_good_text_is_read_by_the_first(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", LINES[:3])
    assert read_pdf((tmp_path / "a.pdf").read_bytes(), "a.pdf").notes == ("3 pages",)


def test_a_text_that_is_glued_in_part_makes_the_second_reader_worth_a_try() -> None:
    glued = "Theharbourandthemuseumandthelibraryofthetownandthegarden."
    text = " ".join([*LINES[:18], glued, *LINES[18:], glued])
    assert 0.05 < measure(text).badness < 0.15 and not measure(text).faults
    assert measure(" ".join(LINES)).badness == 0


def test_text_that_no_reader_makes_words_of_is_refused(tmp_path: Path) -> None:
    write_glued_pdf(tmp_path / "a.pdf", LINES, gap=0.08)
    with pytest.raises(
        DocumentError, match="a.pdf gives no readable text .*glued.*ocrmypdf --force"
    ):
        read_pdf((tmp_path / "a.pdf").read_bytes(), "a.pdf")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (prose(40), None),
        (prose(40).replace(" ", ""), "glued"),
        (" ".join(prose(40).replace(" ", "")), "torn apart"),
        (prose(40).replace("o", "\ufffd"), "no letters that are known"),
        (prose(40).replace("a", "\ue001"), "no letters that are known"),
        ("(cid:12)(cid:7) " * 200, "no letters that are known"),
        ("/&%$ §=? " * 100, "letters or digits"),
        ("橋は川の上にかかっている。" * 40, None),
        (
            "Die Donaudampfschifffahrtsgesellschaft fährt. " + 9 * "Sie tut es heute und morgen. ",
            None,
        ),
        ("The ResponseCodeInterpreterCallCompletedEvent is sent once. " * 20, None),
    ],
)
def test_the_measure_of_a_text(text: str, fault: str | None) -> None:
    faults = measure(text).faults
    assert faults == () if fault is None else any(fault in one for one in faults)


def pages(count: int, head: str, foot: str) -> list[str]:
    return [
        "\n".join([head.format(n=n + 1), *LINES[3 * n : 3 * n + 3], foot.format(n=n + 1)])
        for n in range(count)
    ]


@pytest.mark.parametrize(
    ("head", "foot"),
    [
        ("The town's plan", "{n}"),
        ("- {n} -", "Printed for the council"),
        ("Chapter 2: Harbours          {n}", "https://town.example"),
        ("Page {n} of 8", "Confidential"),
    ],
)
def test_running_heads_and_page_numbers_are_left_out(head: str, foot: str) -> None:
    text = text_of_pages(pages(8, head, foot))
    assert text.split() == " ".join(LINES[:24]).split()


def test_heads_that_change_from_chapter_to_chapter() -> None:
    made = [
        f"{n} {'ABCDEFGH'[n]} of the harbour\n{LINES[2 * n]}\n{LINES[2 * n + 1]}" for n in range(8)
    ]
    assert text_of_pages(made).split() == " ".join(LINES[:16]).split()


def test_numbers_that_are_no_page_numbers_stay() -> None:
    made = [f"Table\n{LINES[n]}\n{LINES[n + 9]}\n{1900 + 7 * n * n}" for n in range(6)]
    text = text_of_pages(made)
    assert all(str(1900 + 7 * n * n) in text for n in range(6))
    two = text_of_pages(["Head\nOne text here", "Head\nTwo text here"])
    assert two.count("Head") == 2  # too few to tell


def test_lines_of_contents_are_left_out() -> None:
    contents = "Contents\nHarbours . . . . . . . 12\nShips .......... iv\nOne . . 8"
    text = text_of_pages([f"{contents}\nIt is so ... yes\nAnd so on...."])
    assert text == "Contents\nIt is so ... yes\nAnd so on...."


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        ("the har-\nbour is old", "the harbour is old"),
        ("the har\u00ad\nbour is old", "the harbour is old"),
        ("soft\u00adly said", "softly said"),
        ("a well-known one, and a well-\nknown one", "a well-known one, and a well-known one"),
        ("from Rhein-\nMain", "from Rhein-Main"),
        ("from 5-\n7 days", "from 5-\n7 days"),
    ],
)
def test_words_that_a_line_end_divides(text: str, joined: str) -> None:
    assert joined_words(text) == joined


def test_in_plain_text_only_words_that_are_known_are_put_together() -> None:
    assert joined_words("the har-\nbour", always=False) == "the har-\nbour"
    assert joined_words("harbour: the har-\nbour", always=False) == "harbour: the harbour"


def test_raised_numbers_do_not_join_the_number_before(tmp_path: Path) -> None:
    said = "A flow of 10<super>5</super> litres, 3×10<super>-4</super> mol of H<sub>2</sub>O."
    body = getSampleStyleSheet()["BodyText"]
    SimpleDocTemplate(str(tmp_path / "a.pdf")).build([Paragraph(said, body)])
    found = read_pdf((tmp_path / "a.pdf").read_bytes(), "a.pdf")
    assert found.text == "A flow of 10^5 litres, 3×10^-4 mol of H2O."


def test_letters_that_fonts_leave_behind() -> None:
    assert plain_letters("ﬁnd the ﬂow, oﬃcial\x00 \ud835") == "find the flow, official \ufffd"
    assert plain_letters("10⁵, 2½, −5, Ⅳ, ﹪, ㎡") == "10⁵, 2½, −5, Ⅳ, ﹪, ㎡"
