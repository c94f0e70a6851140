"""Bytes to text: the encoding of a file, and the refusal of what is not text.

A byte order mark decides; then what the file declares about itself (HTML); then UTF-8; then
charset-normalizer's best guess, which is reported, because a guess can be wrong.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

from charset_normalizer import from_bytes

from cartridge_distill.util.errors import DocumentError

# UTF-32 first: its little-endian mark begins with the one of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What no text holds: control characters other than tab, line feed, form feed, return and escape.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")
_GUESSED_FROM = 262_144  # bytes; enough for any encoding to show


@dataclass(frozen=True)
class Decoded:
    """A text, the encoding it was read with, and whether that was a guess."""

    text: str
    encoding: str
    guessed: bool


def decode(data: bytes, name: str, declared: str | None = None) -> Decoded:
    """The text of a file; line ends become ``\\n``.

    Args:
        data: the whole file.
        name: of the file, for the messages.
        declared: the encoding that the file names for itself, if it does.

    Raises:
        DocumentError: a binary file, or an encoding that cannot be told.
    """
    encoding, guessed = _encoding(data, declared), False
    if encoding is None:
        if b"\x00" in data:
            raise _binary(name)
        best = from_bytes(data[:_GUESSED_FROM]).best()
        if best is None:
            raise _binary(name)
        encoding, guessed = best.encoding, True
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{name} begins as {encoding} text, but not all of it is ({error}). "
            "Save it as UTF-8 with an editor, or take it out."
        ) from error
    if _CONTROL.search(text):
        raise _binary(name)
    return Decoded(text.replace("\r\n", "\n").replace("\r", "\n"), encoding, guessed)


def _encoding(data: bytes, declared: str | None) -> str | None:
    """The encoding that is certain, if one is."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return encoding
    return next((name for name in (declared, "utf-8") if name and _decodes(data, name)), None)


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except (UnicodeDecodeError, LookupError):  # LookupError: a page may declare nonsense
        return False
    return True


def _binary(name: str) -> DocumentError:
    return DocumentError(
        f"{name} is a binary file or in an unknown encoding, not text. Save it as UTF-8 text, "
        "or take it out."
    )
