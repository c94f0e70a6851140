"""Real files for the tests to read."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from pypdf import PdfWriter
from pypdf.generic import ArrayObject, NameObject, NumberObject
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import getSampleStyleSheet
from reportlab.lib.utils import simpleSplit
from reportlab.pdfbase.pdfmetrics import stringWidth
from reportlab.pdfgen.canvas import Canvas
from reportlab.platypus import Paragraph, SimpleDocTemplate

SUBJECTS = ("harbour", "museum", "library", "railway", "garden", "theatre", "market", "bridge")


def sentence(number: int) -> str:
    """A sentence of its own for each number; reads like prose."""
    subject = SUBJECTS[number % len(SUBJECTS)]
    return f"The {subject} of district {number} opened in {1800 + number % 200} after long debate."


def prose(sentences: int, first: int = 0, per_paragraph: int = 5) -> str:
    """Paragraphs of such sentences with blank lines between."""
    found = [sentence(number) for number in range(first, first + sentences)]
    paragraphs = [found[at : at + per_paragraph] for at in range(0, sentences, per_paragraph)]
    return "\n\n".join(" ".join(paragraph) for paragraph in paragraphs)


def write_pdf(path: Path, pages: Sequence[str], title: str = "") -> None:
    """One page for each text, in lines as wide as the page; an empty text is an empty page."""
    canvas = Canvas(str(path), pagesize=A4)
    canvas.setTitle(title)
    for text in pages:
        lines = canvas.beginText(60, 780)
        for line in simpleSplit(text, "Helvetica", 11, 470):
            lines.textLine(line)
        canvas.setFont("Helvetica", 11)
        canvas.drawText(lines)
        canvas.showPage()
    canvas.save()


def write_typeset_pdf(path: Path, paragraphs: Sequence[str]) -> None:
    """A text that a layout engine breaks into lines and pages."""
    style = getSampleStyleSheet()["BodyText"]
    SimpleDocTemplate(str(path)).build([Paragraph(text, style) for text in paragraphs])


def encrypted(pdf: Path, user_password: str) -> bytes:
    """The same file in AES-256; an empty password lets every reader open it."""
    writer = PdfWriter(clone_from=pdf)
    writer.encrypt(user_password, owner_password="owner", algorithm="AES-256")
    out = BytesIO()
    writer.write(out)
    return out.getvalue()


def write_glued_pdf(path: Path, lines: Sequence[str], gap: float) -> None:
    """Words set apart by moves of `gap` of the font's size, in a font whose space is far wider.

    That is how TeX sets text; a reader that measures gaps by the font's space glues the words.
    """
    canvas = Canvas(str(path), pagesize=A4)
    for place, line in enumerate(lines):
        text = canvas.beginText(50, 800 - 12 * (place % 60))
        text.setFont("Helvetica", 9)
        shown = f" {-1000 * gap:.0f} ".join(f"({word})" for word in line.split())
        text._code.append(f"[{shown}] TJ")
        canvas.drawText(text)
    canvas.save()
    writer = PdfWriter(clone_from=path)
    widths = [700, *(int(stringWidth(chr(code), "Helvetica", 1000)) for code in range(33, 123))]
    for font in writer.pages[0]["/Resources"]["/Font"].values():  # type: ignore[index]
        font.get_object().update(
            {
                NameObject("/FirstChar"): NumberObject(32),
                NameObject("/LastChar"): NumberObject(122),
                NameObject("/Widths"): ArrayObject(map(NumberObject, widths)),
            }
        )
    writer.write(path)
