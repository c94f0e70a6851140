"""Files to documents: which files of a folder, and the text out of each kind.

    .txt            as it is
    .md, .markdown  as it is
    .html, .htm     the page's `main`, `article` or body as Markdown, less scripts and navigation
    .pdf            the text of its pages; a page without any is named, a scan is refused

Nothing is lost in silence: a file of another kind is named among the skipped ones, and a file of
these kinds that gives no text is an error that says how to fix it.

Not done here: OCR, office formats, and undoing a PDF's line ends (structure.py reads over them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from bs4 import BeautifulSoup
from bs4.dammit import EncodingDetector
from markdownify import MarkdownConverter
from pypdf import PasswordType, PdfReader
from tqdm import tqdm

from cartridge_distill.data.documents.decoding import Decoded, decode
from cartridge_distill.data.documents.structure import first_heading
from cartridge_distill.util.errors import DocumentError
from cartridge_distill.util.lfs import about, is_pointer

_NO_PROSE = ("head", "script", "style", "template", "noscript", "svg", "nav", "form", "iframe")
_PAGES_NAMED = 8


@dataclass(frozen=True)
class ReadFile:
    """The text of one file.

    Attributes:
        document_id: the file's path below the folder that was read, with `/` between.
        title: the document's own title, else the file's name without its ending.
        text: never empty.
        notes: what a user should know about how it was read.
    """

    document_id: str
    title: str
    text: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What a folder gave: documents, and a line for each file that was left out."""

    documents: tuple[ReadFile, ...]
    skipped: tuple[str, ...]


def read_documents(path: Path, skip_unreadable: bool = False) -> Reading:
    """Reads a file, or all files of a folder and of those below it, in order of their names.

    Hidden files and folders (a leading dot) are not looked at. Of two files with the same text the
    first is kept.

    Args:
        path: a file, or a folder.
        skip_unreadable: leave files out that cannot be read, instead of refusing them.

    Raises:
        DocumentError: there is no such path, nothing in it can be read, or, without
            `skip_unreadable`, some file of a known kind cannot be; every such file is named.
    """
    if not path.exists():
        raise DocumentError(f"{path} does not exist. Name a file or a folder of documents.")
    if path.is_file() and path.suffix.lower() not in KINDS:
        raise DocumentError(f"{path}: {_unknown_kind(path)}; records are read from .json files.")
    files = [path] if path.is_file() else _files_below(path)
    root = path.parent if path.is_file() else path
    documents: dict[str, ReadFile] = {}
    skipped: list[str] = []
    refused: list[str] = []
    for file in files:
        document_id = file.relative_to(root).as_posix()
        if file.suffix.lower() not in KINDS:
            skipped.append(f"{document_id}: {_unknown_kind(file)}")
            continue
        try:
            read = read_file(file, document_id)
        except DocumentError as error:
            (skipped if skip_unreadable else refused).append(str(error))
            continue
        if read.text in documents:
            skipped.append(f"{document_id}: the same text as {documents[read.text].document_id}")
            continue
        documents[read.text] = read
    if refused:
        raise DocumentError(
            "\n- ".join(
                [
                    f"{len(refused)} of {len(files)} files cannot be read (--skip-unreadable "
                    "leaves such files out):",
                    *refused,
                ]
            )
        )
    if not documents:
        reasons = "".join(f"\n- {line}" for line in skipped)
        raise DocumentError(
            f"{path} has no document in it: no readable {', '.join(KINDS)} file.{reasons}"
        )
    return Reading(tuple(documents.values()), tuple(skipped))


def read_file(path: Path, document_id: str | None = None) -> ReadFile:
    """The document in one file.

    Raises:
        DocumentError: it cannot be read or holds no text; names the file and the fix.
    """
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise DocumentError(f"{path}: {_unknown_kind(path)}.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror}.") from error
    if not data.strip():
        raise DocumentError(f"{path} is empty. Put text in, or take it out.")
    if is_pointer(data):
        raise DocumentError(about(path))
    title, text, notes = kind(data, str(path))
    if not text.strip():
        raise DocumentError(f"{path} holds no text. Put some in, or take it out.")
    return ReadFile(document_id or path.name, title or path.stem, text.strip(), tuple(notes))


def _files_below(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(folder).parts)
    )


def _unknown_kind(path: Path) -> str:
    ending = path.suffix or "no ending"
    return f"not a kind that is read ({ending}; known: {', '.join(KINDS)})"


# --- one function a kind: bytes and name to (title or None, text, notes) --------------------------

_Read = tuple[str | None, str, Sequence[str]]


def _plain(data: bytes, name: str) -> _Read:
    decoded = decode(data, name)
    return first_heading(decoded.text), decoded.text, _about_encoding(decoded)


def _html(data: bytes, name: str) -> _Read:
    decoded = decode(data, name, EncodingDetector.find_declared_encoding(data, is_html=True))
    soup = BeautifulSoup(decoded.text, "html.parser")
    heading = soup.title or soup.h1
    title = " ".join(heading.get_text().split()) if heading else None
    for tag in soup.find_all(_NO_PROSE):
        tag.decompose()
    candidates = [soup.find_all(tag) for tag in ("main", "article", "body")]
    page = next((found[0] for found in candidates if len(found) == 1), soup)
    converter = MarkdownConverter(
        heading_style="ATX",
        strip=["a", "img"],  # the words of a link, not where it leads
        escape_asterisks=False,
        escape_underscores=False,
        escape_misc=False,
    )
    try:
        text = str(converter.convert_soup(page))
    except RecursionError as error:
        raise DocumentError(
            f"{name} nests its tags too deeply to be read. Save the page as text."
        ) from error
    if not text.strip():
        raise DocumentError(
            f"{name} is a page without text. If a script fills it, save it from a browser once it "
            "is shown, or as PDF."
        )
    return title, text, _about_encoding(decoded)


def _about_encoding(decoded: Decoded) -> list[str]:
    if not decoded.guessed:
        return []
    return [f"read as {decoded.encoding}, a guess: save it as UTF-8 if letters look wrong"]


def _pdf(data: bytes, name: str) -> _Read:
    try:
        reader = PdfReader(BytesIO(data))
        if reader.is_encrypted and reader.decrypt("") == PasswordType.NOT_DECRYPTED:
            raise DocumentError(
                f"{name} is encrypted, and opens with a password only. Save it without one "
                "(qpdf --decrypt --password=... in.pdf out.pdf)."
            )
        title = reader.metadata.title if reader.metadata else None
        # A bar that shows itself after three seconds.
        pages = tqdm(reader.pages, desc=name, unit=" pages", leave=False, delay=3, disable=None)
        texts = [_clean(page.extract_text()) for page in pages]
    except DocumentError:
        raise
    except Exception as e:  # The parser fails in as many ways as files are broken; all end here.
        raise DocumentError(
            f"{name} is no PDF that can be read ({type(e).__name__}: {e}). Open it in a viewer and "
            "print it to a new PDF, or take it out."
        ) from e
    empty = [number for number, text in enumerate(texts, 1) if not text.strip()]
    if len(empty) == len(texts):
        raise DocumentError(
            f"{name} has no text on any of its {len(texts)} pages: a scan. Run OCR over it first "
            "(ocrmypdf in.pdf out.pdf)."
        )
    notes = [f"{len(texts)} pages"]
    if empty:
        more = ", ..." if len(empty) > _PAGES_NAMED else ""
        numbers = ", ".join(map(str, empty[:_PAGES_NAMED])) + more
        notes.append(f"no text on {len(empty)} of them ({numbers}): blank or scanned")
    return (title or "").strip() or None, _join_pages(texts), notes


def _clean(text: str) -> str:
    """Without what fonts leave behind: null characters and halves of surrogate pairs."""
    return text.replace("\x00", "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _join_pages(texts: Sequence[str]) -> str:
    """A blank line between pages, none where a sentence goes on over the page."""
    joined = ""
    for text in filter(None, (text.strip() for text in texts)):
        goes_on = joined and joined[-1] not in ".!?:;" and text[0].islower()
        joined += ("\n" if goes_on else "\n\n") * bool(joined) + text
    return joined


KINDS: dict[str, Callable[[bytes, str], _Read]] = {
    ".txt": _plain,
    ".md": _plain,
    ".markdown": _plain,
    ".html": _html,
    ".htm": _html,
    ".pdf": _pdf,
}
