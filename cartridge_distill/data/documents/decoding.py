"""Bytes to text: the encoding of a file, and the refusal of what is not text.

That bytes decode proves little: nearly every byte is a letter in some encoding. So, in this order:

1. a byte order mark decides;
2. bytes with a zero in every other place are UTF-16;
3. valid UTF-8 is UTF-8, whatever the file declares, and so is UTF-8 with few bad bytes, which are
   reported; pure ASCII needs no more, and the escapes of ISO-2022-JP speak for themselves;
4. what the file declares (HTML), under the web's names for it (WHATWG: "latin-1" is windows-1252),
   if the text that it gives is as likely as that of a guess;
5. the web encoding that gives the likeliest text (`likely.py`), which is reported.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

import webencodings

from cartridge_distill.data.documents.likely import likeliest, unlikeliness
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
# What a terminal shows as bold, underlined or coloured: a manual page that went into a file.
_TERMINAL = re.compile(r".\x08|\x1b\[[0-9;]*[A-Za-z]")
_ISO_2022_JP = re.compile(rb"\x1b\$[@B]")
_ZEROS = 0.3  # of every second byte; more is UTF-16
_GOOD_FOR_BAD = 20  # characters of several bytes for each bad byte of what still counts as UTF-8


_DOUBT = 0.1  # how much likelier a guess must be than what the file declares


@dataclass(frozen=True)
class Decoded:
    """A text, the encoding it was read with, and what a user should know about that."""

    text: str
    encoding: str
    note: str = ""


def decode(data: bytes, name: str, declared: str | None = None) -> Decoded:
    """The text of a file; line ends become ``\\n``.

    Args:
        data: the whole file.
        name: of the file, for the messages.
        declared: the encoding that the file names for itself, if it does.

    Raises:
        DocumentError: a binary file, or an encoding that cannot be told.
    """
    found = _marked(data, name) or _utf(data) or _legacy(data, declared)
    if found is None:
        raise _binary(name)
    text = _TERMINAL.sub("", found.text)
    if _CONTROL.search(text):
        raise _binary(name)
    return Decoded(text.replace("\r\n", "\n").replace("\r", "\n"), found.encoding, found.note)


def _marked(data: bytes, name: str) -> Decoded | None:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return Decoded(data.decode(encoding), encoding)
            except UnicodeDecodeError as error:
                raise DocumentError(
                    f"{name} begins as {encoding} text, but not all of it is ({error}); "
                    "fix: save it as UTF-8 with an editor, or take it out"
                ) from error
    return None


def _utf(data: bytes) -> Decoded | None:
    """UTF-16 without a mark, UTF-8, ASCII and ISO-2022-JP."""
    sample = data[:65_536]
    for encoding, zeros in (("utf-16-le", sample[1::2]), ("utf-16-be", sample[::2])):
        if len(data) % 2 == 0 and zeros.count(0) > _ZEROS * len(zeros):
            text = _decoded(data, encoding)
            if text is not None and not _CONTROL.search(text):
                return Decoded(text, encoding)
    if _ISO_2022_JP.search(data) and (text := _decoded(data, "iso2022_jp")) is not None:
        return Decoded(text, "iso-2022-jp")
    text = _decoded(data, "utf-8")
    if text is not None:
        return Decoded(text, "utf-8")
    text = data.decode("utf-8", "replace")
    bad = text.count("\ufffd")
    if sum(not char.isascii() for char in text) > (1 + _GOOD_FOR_BAD) * bad:
        return Decoded(text, "utf-8", f"{bad} bytes of it are no UTF-8: they became \ufffd")
    return None


def _legacy(data: bytes, declared: str | None) -> Decoded | None:
    """As the file declares it, or as is likeliest."""
    if b"\x00" in data:
        return None
    best = likeliest(data)
    label = webencodings.lookup(declared) if declared else None
    if label is not None and not label.name.startswith("utf-"):
        text = _decoded(data, label.codec_info.name)
        if text is not None:
            codec = label.codec_info.name.replace("-", "_")
            if best is None or unlikeliness(text, codec) <= best.cost + _DOUBT:
                return Decoded(text, label.name)
    if best is None:
        return None
    said = f"read as {best.encoding}, a guess: save it as UTF-8 if letters look wrong"
    if declared:
        said = f"it says that it is {declared}, which gives no likely text; {said}"
    return Decoded(best.text, best.encoding, said)


def _decoded(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def _binary(name: str) -> DocumentError:
    return DocumentError(
        f"{name} is a binary file or in an unknown encoding, not text. Save it as UTF-8 text, "
        "or take it out."
    )
