"""Files to documents: which files of a folder, and the text out of each kind.

    .txt            as it is, less page heads where it has form feeds (manual_page.py), and as
                    .rst where it looks so
    .rst            less directives, comments and addresses (restructured.py)
    .md, .markdown  less front matter, comments, images and addresses (markdown.py)
    .html, .htm     the page's main part as Markdown, less navigation (page.py)
    .pdf            the text of its pages, less running heads (pdf.py, page_lines.py)

Nothing is lost in silence: a file of another kind is named among the skipped ones, and a file of
these kinds that gives no text is an error that says how to fix it.

Not done here: OCR, office formats, and undoing line ends (structure.py reads over them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cartridge_distill.data.documents.blocks import Form
from cartridge_distill.data.documents.decoding import decode
from cartridge_distill.data.documents.manual_page import without_head
from cartridge_distill.data.documents.markdown import clean_markdown
from cartridge_distill.data.documents.page import read_page
from cartridge_distill.data.documents.page_lines import plain_letters, text_of_pages
from cartridge_distill.data.documents.pdf import read_pdf
from cartridge_distill.data.documents.restructured import clean_restructured, looks_restructured
from cartridge_distill.data.documents.structure import first_heading
from cartridge_distill.util.errors import DocumentError
from cartridge_distill.util.lfs import about, is_pointer
from cartridge_distill.util.shown_text import name_as_text

_NAMED = 3  # of files of one kind that is not read
_CONVERTED = frozenset(
    (".docx", ".doc", ".odt", ".rtf", ".epub", ".tex", ".org", ".adoc", ".textile", ".ipynb")
)


@dataclass(frozen=True)
class ReadFile:
    """The text of one file.

    Attributes:
        document_id: the file's path below the folder that was read, with `/` between.
        title: the document's own title, else the file's name without its ending.
        text: never empty.
        form: which rules its structure is read by.
        notes: what a user should know about how it was read.
    """

    document_id: str
    title: str
    text: str
    form: Form
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What a folder gave: documents, and a line for each file that was left out."""

    documents: tuple[ReadFile, ...]
    skipped: tuple[str, ...]


def read_documents(path: Path, skip_unreadable: bool = False) -> Reading:
    """Reads a file, or all files of a folder and of those below it, in order of their names.

    Hidden files and folders (a leading dot) are not looked at, and links to folders are not
    followed; a line says so of each. Of two files with the same text the first is kept.

    Args:
        path: a file, or a folder.
        skip_unreadable: leave files out that cannot be read, instead of refusing them.

    Raises:
        DocumentError: there is no such path, nothing in it can be read, or, without
            `skip_unreadable`, some file of a known kind cannot be; every such file is named.
    """
    if not path.exists():
        raise DocumentError(f"{path} does not exist; fix: name a file or a folder of documents")
    check_kind(path)
    files = [path] if path.is_file() else _files_below(path)
    root = path.parent if path.is_file() else path
    documents: dict[str, ReadFile] = {}
    skipped = _no_files(path) if path.is_dir() else []
    refused: list[str] = []
    unknown: dict[str, list[str]] = {}
    for file in files:
        document_id = name_as_text(file.relative_to(root).as_posix())
        if file.suffix.lower() not in KINDS:
            unknown.setdefault(file.suffix.lower(), []).append(document_id)
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
    skipped += [line for ending in sorted(unknown) for line in _unread(ending, unknown[ending])]
    if refused:
        raise DocumentError(
            "\n- ".join(
                [
                    f"{len(refused)} of {len(files)} files cannot be read; fix: what each "
                    "line says, or --skip-unreadable, which leaves such files out:",
                    *refused,
                ]
            )
        )
    if not documents:
        reasons = "".join(f"\n- {line}" for line in skipped)
        raise DocumentError(
            f"{path} has no document in it; fix: name one with a readable {', '.join(KINDS)} file"
            f"{reasons}"
        )
    return Reading(tuple(documents.values()), tuple(skipped))


def check_kind(path: Path) -> None:
    """Is it a folder, or a file of a kind that is read? Its name alone is looked at.

    Raises:
        DocumentError: it is neither.
    """
    if path.is_file() and path.suffix.lower() not in KINDS:
        raise DocumentError(f"{path}: {_refused_kind(path)} (records with questions: .json)")
    if not path.is_file() and not path.is_dir():
        raise DocumentError(
            f"{path} is no file (a pipe, a socket or a device); fix: save it as one"
        )


def read_file(path: Path, document_id: str | None = None) -> ReadFile:
    """The document in one file.

    Raises:
        DocumentError: it cannot be read or holds no text; names the file and the fix.
    """
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise DocumentError(f"{path}: {_refused_kind(path)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DocumentError(
            f"{path} cannot be read: {error.strerror}; fix: make it readable, or take it out"
        ) from error
    if not data.strip():
        raise DocumentError(f"{path} is empty; fix: put text in, or take it out")
    if is_pointer(data):
        raise DocumentError(about(path))
    title, text, notes, form = kind(data, str(path))
    if not text.strip():
        raise DocumentError(f"{path} holds no text; fix: put some in, or take it out")
    text = text.strip("\n").rstrip()
    text = text.strip() if form == "markdown" else text
    name, stem = name_as_text(path.name), name_as_text(path.stem)
    return ReadFile(document_id or name, title or stem, text, form, tuple(notes))


def _files_below(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(folder).parts)
    )


def _no_files(folder: Path) -> list[str]:
    """A line for each thing below a folder that is no file and no folder to look into."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        if path.is_symlink() and path.is_dir():
            found.append(f"{name.as_posix()}: a link to a folder, which is not followed")
        elif path.is_symlink() and not path.exists():
            found.append(f"{name.as_posix()}: a link to {path.readlink()}, which does not exist")
        elif not path.is_file() and not path.is_dir():
            found.append(f"{name.as_posix()}: no file (a pipe, a socket or a device)")
    return found


def _unread(ending: str, names: Sequence[str]) -> list[str]:
    """A line for each file of a kind that is not read, or one for all of them if there are many."""
    why = _unknown_kind(Path(names[0]))
    if len(names) <= _NAMED:
        return [f"{name}: {why}" for name in names]
    shown = ", ".join(names[:_NAMED])
    return [f"{shown} and {len(names) - _NAMED} more files like them: {why}"]


def _unknown_kind(path: Path) -> str:
    ending = path.suffix.lower()
    said = f"not a kind that is read ({ending or 'no ending'}; known: {', '.join(KINDS)})"
    if ending in _CONVERTED:
        said += f"; convert it first: pandoc FILE{ending} -o FILE.md, or save it as PDF or HTML"
    return said


def _refused_kind(path: Path) -> str:
    said, convert, how = _unknown_kind(path).partition("; convert it first: ")
    return f"{said}; fix: {how if convert else 'save it as one of them'}"


# --- one function a kind: bytes and name to (title or None, text, notes, form) --------------------

_Read = tuple[str | None, str, Sequence[str], Form]


def _plain(data: bytes, name: str) -> _Read:
    decoded = decode(data, name)
    name_of_page, text = without_head(plain_letters(decoded.text))
    if looks_restructured(text):
        text = clean_restructured(text)
    text = text_of_pages(text.split("\f"), divided=False)
    return name_of_page or first_heading(text, "plain"), text, _noted(decoded.note), "plain"


def _restructured(data: bytes, name: str) -> _Read:
    decoded = decode(data, name)
    text = clean_restructured(plain_letters(decoded.text))
    return first_heading(text, "plain"), text, _noted(decoded.note), "plain"


def _markdown(data: bytes, name: str) -> _Read:
    decoded = decode(data, name)
    title, text = clean_markdown(decoded.text)
    return title or first_heading(text, "markdown"), text, _noted(decoded.note), "markdown"


def _html(data: bytes, name: str) -> _Read:
    page = read_page(data, name)
    return page.title, page.text, page.notes, "markdown"


def _pdf(data: bytes, name: str) -> _Read:
    found = read_pdf(data, name)
    return found.title, found.text, found.notes, found.form


def _noted(note: str) -> list[str]:
    return [note] if note else []


KINDS: dict[str, Callable[[bytes, str], _Read]] = {
    ".txt": _plain,
    ".md": _markdown,
    ".markdown": _markdown,
    ".rst": _restructured,
    ".html": _html,
    ".htm": _html,
    ".xhtml": _html,
    ".pdf": _pdf,
}
