"""A PDF to text, by the first of two readers whose text reads like words.

pypdf reads it first. Where its text does not read well (`quality`), PDFium does, which finds the
spaces between words by the places of the letters; the better of both is taken. In Chinese or Thai
no measure of words tells whether the Latin words in between are glued, so there both read it. A
text that no reader makes words of is refused, since a model would learn it as it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import TypeVar

import pypdfium2 as pdfium
from pypdf import PasswordType, PdfReader
from tqdm import tqdm

from cartridge_distill.data.documents.blocks import Form
from cartridge_distill.data.documents.page_lines import plain_letters, text_of_pages
from cartridge_distill.data.documents.pdf_lines import marked_pages
from cartridge_distill.data.documents.pdf_powers import page_lines
from cartridge_distill.data.documents.quality import measure
from cartridge_distill.util.errors import DocumentError

T = TypeVar("T")
# What pypdf says of single fonts is not what its text is worth; `quality` measures that.
logging.getLogger("pypdf").setLevel(logging.ERROR)
_LATIN = re.compile(r"[A-Za-z]+")
_ALIKE = 0.01
_PAGES_NAMED = 8
_HOPELESS = 0.5  # of `badness`: refused
_SUSPECT, _CLEARLY = 0.05, 0.03  # the second reader is asked, and must be so much better


@dataclass(frozen=True)
class Pdf:
    """A PDF's own title, its text, and what a user should know about it."""

    title: str | None
    text: str
    notes: tuple[str, ...]
    form: Form


def read_pdf(data: bytes, name: str) -> Pdf:
    """The text of a PDF.

    Raises:
        DocumentError: it is encrypted, broken or a scan, or no reader makes words of it.
    """
    reader = _opened(data, name)
    title = _attempt(lambda: reader.metadata.title if reader.metadata else None, name)
    pages, form = _attempt(lambda: _by_pypdf(reader, name), name)
    notes = [f"{len(pages)} pages"]
    text = text_of_pages(pages)
    quality = measure(text)
    if quality.faults or quality.badness > _SUSPECT or not quality.word_length:
        other = _attempt(lambda: _by_pdfium(data), name)
        other_text = text_of_pages(other)
        other_quality = measure(other_text)
        better = other_quality.badness < quality.badness - _CLEARLY or not quality.words
        if (better or _glued_in_between(text, other_text)) and other_quality.words:
            notes.append("read by PDFium, whose text reads more like words than pypdf's")
            pages, text, quality, form = other, other_text, other_quality, "plain"
    empty = [number for number, page in enumerate(pages, 1) if not page.strip()]
    if len(empty) == len(pages):
        raise DocumentError(
            f"{name} has no text on any of its {len(pages)} pages: a scan; fix: run OCR over it "
            "first (ocrmypdf in.pdf out.pdf)"
        )
    if quality.faults and quality.badness > _HOPELESS:
        raise DocumentError(
            f"{name} gives no readable text ({'; '.join(quality.faults)}); fix: run OCR over "
            "it (ocrmypdf --force-ocr in.pdf out.pdf), or save it as text from a viewer"
        )
    if empty:
        more = ", ..." if len(empty) > _PAGES_NAMED else ""
        numbers = ", ".join(map(str, empty[:_PAGES_NAMED])) + more
        notes.append(f"no text on {len(empty)} of them ({numbers}): blank or scanned")
    return Pdf((title or "").strip() or None, text, tuple(notes), form)


def _glued_in_between(text: str, other: str) -> bool:
    """Does the other reader tell more Latin words apart, of as many letters?"""
    ours, theirs = _LATIN.findall(text), _LATIN.findall(other)
    letters, as_many = sum(map(len, ours)), sum(map(len, theirs))
    alike = abs(letters - as_many) <= _ALIKE * letters
    return alike and len(theirs) > (1 + _ALIKE) * len(ours)


def _opened(data: bytes, name: str) -> PdfReader:
    def open_it() -> PdfReader:
        reader = PdfReader(BytesIO(data))
        if reader.is_encrypted and reader.decrypt("") == PasswordType.NOT_DECRYPTED:
            raise DocumentError(
                f"{name} is encrypted, and opens with a password only; fix: save it without "
                "one (qpdf --decrypt --password=... in.pdf out.pdf)"
            )
        return reader

    return _attempt(open_it, name)


def _attempt(action: Callable[[], T], name: str) -> T:
    try:
        return action()
    except DocumentError:
        raise
    except Exception as e:  # The parser fails in as many ways as files are broken; all end here.
        raise DocumentError(
            f"{name} is no PDF that can be read ({type(e).__name__}: {e}); fix: open it in a "
            "viewer and print it to a new PDF, or take it out"
        ) from e


def _by_pypdf(reader: PdfReader, name: str) -> tuple[list[str], Form]:
    # A bar that shows itself after three seconds.
    pages = tqdm(reader.pages, desc=name, unit=" pages", leave=False, delay=3, disable=None)
    texts, form = marked_pages([page_lines(page) for page in pages])
    return [plain_letters(text) for text in texts], form


def _by_pdfium(data: bytes) -> list[str]:
    document = pdfium.PdfDocument(data)
    try:
        found = []
        for page in document:
            said = page.get_textpage().get_text_bounded()
            # U+FFFE is its sign for a hyphen at a line's end.
            found.append(plain_letters(said.replace("\r\n", "\n").replace("\ufffe", "-\n")))
        return found
    finally:
        document.close()
