"""What the fonts of a PDF say: headings are set larger, code in letters of one width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reportlab.lib.styles import getSampleStyleSheet
from reportlab.platypus import Paragraph, Preformatted, SimpleDocTemplate

from cartridge_distill.data.documents.pdf import read_pdf
from cartridge_distill.data.documents.pdf_lines import Line, is_of_one_width, marked_pages
from cartridge_distill.data.documents.structure import pieces, sections, sentences
from tests.data.documents.made import prose, sentence

STYLES = getSampleStyleSheet()
PROGRAM = "def open_harbour(gate):\n    gate.lift()\n\n    return gate.height"


def text(*said: str, style: str = "BodyText") -> list[Any]:
    return [Paragraph(one, STYLES[style]) for one in said]


def written(path: Path, *story: Any) -> Any:
    SimpleDocTemplate(str(path)).build([part for parts in story for part in parts])
    return read_pdf(path.read_bytes(), path.name)


def test_headings_without_numbers_begin_no_sentence(tmp_path: Path) -> None:
    long = (
        "How the harbour of the town was opened again after the long and cold winter of that year"
    )
    found = written(
        tmp_path / "a.pdf",
        text("The harbour", style="Heading2"),
        text(prose(5)),
        text("Gates and <i>bridges</i>", style="Heading3"),
        text(prose(5, first=5)),
        text(long, style="Heading1"),
        text(prose(5, first=10)),
    )
    assert found.form == "plain"  # there is no code in it
    names = [name for name, _, _ in sections(found.text, found.form)]
    assert names[:2] == ["The harbour", "Gates and bridges"]
    assert sentences(found.text, found.form)[0] == sentence(0)
    # Of two lines, one; too long for the name of a section, and still no part of a sentence.
    assert f"\n\n{long}\n\n" in found.text


def test_code_is_told_from_prose(tmp_path: Path) -> None:
    found = written(
        tmp_path / "a.pdf",
        text(prose(3), "A gate opens like this:"),
        [Preformatted(PROGRAM, STYLES["Code"])],
        text(sentence(7), "and this is all of it:"),
        [Preformatted("open_harbour(gate)", STYLES["Code"])],
        text(prose(3, first=20)),
    )
    assert found.form == "typeset"
    code = "".join(
        found.text[piece.start : piece.end]
        for piece in pieces(found.text, found.form)
        if piece.kind == "code"
    )
    wanted = [line.strip() for line in (PROGRAM + "\nopen_harbour(gate)").splitlines()]
    assert [line.strip() for line in code.splitlines()] == [line for line in wanted if line]
    said = sentences(found.text, found.form)
    assert sentence(7) in " ".join(said) and "lift" not in " ".join(said)
    assert not any(piece.kind == "heading" for piece in pieces(found.text, found.form))


def line(text: str, size: float = 10.0, one_width: bool = False) -> Line:
    made = Line()
    made.add(text, size, one_width)
    return made


BODY = [line(sentence(number)) for number in range(20)]


def test_what_stays_prose() -> None:
    name = line("/usr/share/doc/harbour/gates", one_width=True)
    pages, form = marked_pages([[*BODY, name, line("is where it lies.")]])
    assert form == "plain" and "\n\n" not in pages[0]
    # A document that is all in one width, as of a typewriter.
    typed = [line(sentence(number), one_width=True) for number in range(20)]
    assert marked_pages([typed])[1] == "plain"
    # The most common size is that of the notes: nearly everything would be a heading.
    notes = [line(sentence(number), size=8.0) for number in range(30)]
    pages, _ = marked_pages([[*notes, *BODY]])
    assert "\n\n" not in pages[0]
    # A large equation, and a large paragraph.
    large = [line(sentence(number), size=14.0) for number in range(3)]
    pages, _ = marked_pages([[*BODY, line("x = 1", size=14.0), *BODY, *large]])
    assert "\n\n" not in pages[0]


def test_what_is_indented_and_no_code_is_not_read_as_code() -> None:
    program = [line(f"open({number})", one_width=True) for number in range(3)]
    pages, form = marked_pages([[line("      Quoted words."), *BODY, *program]])
    assert form == "typeset" and pages[0].startswith("Quoted words.\n")


def test_a_word_that_is_divided_in_a_heading() -> None:
    heading = [line("The opening of the har-", 14.0), line("bour", 14.0), line("  again", 14.0)]
    pages, _ = marked_pages([[*heading, *BODY]])
    assert pages[0].startswith("The opening of the har-\nbour again\n\n")


def test_fonts_of_one_width() -> None:
    class Descriptor(dict[str, Any]):
        def get_object(self) -> Descriptor:
            return self

    assert is_of_one_width({"/BaseFont": "/ABCDEF+CMTT10"})
    assert is_of_one_width({"/BaseFont": "/Courier-Bold"})
    assert is_of_one_width({"/BaseFont": "/F1", "/FontDescriptor": Descriptor({"/Flags": 33})})
    assert not is_of_one_width({"/BaseFont": "/F1", "/FontDescriptor": Descriptor({"/Flags": 32})})
    assert not is_of_one_width({"/BaseFont": "/CMR10"}) and not is_of_one_width(None)
