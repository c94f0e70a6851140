"""Real files for the tests to read."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from pypdf import PdfWriter
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import getSampleStyleSheet
from reportlab.lib.utils import simpleSplit
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
