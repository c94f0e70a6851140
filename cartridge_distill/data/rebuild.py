"""What changed in documents since a cartridge of them was trained, section by section.

A cartridge of a document that changed need not be trained anew: it goes on from the old one, with
half of the prompts about what changed and half about the rest, so that the rest stays (replay). A
rebuild with half replay reached the quality of a new cartridge at half of its cost in
arXiv 2608.30647.

A section has changed where one of its sentences is new or is another, or where a sentence that
stood there is gone. Sentences are compared without regard to spaces and line ends. The documents
are those of the same id; one that was not there before has changed as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path

from cartridge_distill.cartridge.run_folder import data_of, is_run
from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.data.documents.source import Section, Source
from cartridge_distill.data.documents.structure import line_sentences, one_line, pieces
from cartridge_distill.util.errors import ConfigError

DOCUMENTS = "documents.jsonl"


def data_folder(rebuilt_from: Path) -> Path:
    """The data of a run, or the folder itself where it holds documents.

    Raises:
        ConfigError: neither.
    """
    folder = rebuilt_from.expanduser()
    if is_run(folder):
        said = data_of(folder)
        folder = folder / "data" if said is None else Path(said)
    if not (folder / DOCUMENTS).is_file():
        raise ConfigError(
            f"--rebuild {rebuilt_from}: {folder / DOCUMENTS} is not there, and without it nobody "
            "knows what has changed; fix: name the folder of the run whose cartridge is rebuilt, "
            "or the data that it was trained on"
        )
    return folder


def texts_before(folder: Path) -> dict[str, str]:
    """The documents that a data folder was prepared of, by id; parts are joined to wholes.

    Raises:
        DocumentError: they cannot be read.
    """
    store = DocumentStore.from_file(folder / DOCUMENTS)
    found: dict[str, list[str]] = {}
    for name in store.ids:
        whole, mark, number = name.rpartition("#")
        found.setdefault(whole if mark and number.isdecimal() else name, []).append(
            store.text(name)
        )
    return {name: "\n\n".join(texts) for name, texts in found.items()}


def split_by_change(
    sources: Sequence[Source], before: dict[str, str]
) -> tuple[list[Source], list[Source]]:
    """(sources with the sections that changed alone, with the others alone); none without any.

    Args:
        before: the texts of the documents that the cartridge was trained on.

    Raises:
        ConfigError: nothing has changed, or nothing is as it was.
    """
    changed: list[Source] = []
    others: list[Source] = []
    for source in sources:
        found = changed_sections(source, before.get(source.document_id))
        for kept, into in ((True, changed), (False, others)):
            sections = tuple(s for s in source.sections if (s in found) == kept)
            if sections:
                into.append(replace(source, sections=sections))
    names = ", ".join(source.document_id for source in sources[:3])
    if not changed:
        raise ConfigError(
            f"--rebuild: no section of {names} has changed since the cartridge was trained: there "
            "is nothing to rebuild; fix: none is needed, or name an older run"
        )
    if not others:
        raise ConfigError(
            f"--rebuild: no section of {names} is as it was, so there is nothing to replay; fix: "
            "leave --rebuild out, and distil the documents anew"
        )
    return changed, others


def changed_sections(source: Source, before: str | None) -> set[Section]:
    """The sections that are new or other than before.

    Args:
        before: the document's text, as it was; None for a document that was not there.
    """
    if before is None:
        return set(source.sections)
    old = [sentence for sentence, _ in _sentences(before, source)]
    new = _sentences(source.text, source)
    compared = SequenceMatcher(None, old, [sentence for sentence, _ in new], autojunk=False)
    touched: set[int] = set()  # offsets
    for what, _, _, first, last in compared.get_opcodes():
        if what == "delete":  # where it stood: what is now before it and behind it
            touched |= {new[at][1] for at in (first - 1, first) if 0 <= at < len(new)}
        elif what != "equal":
            touched |= {offset for _, offset in new[first:last]}
    # A heading stands before its section.
    return {
        next((section for section in source.sections if offset < section.end), source.sections[-1])
        for offset in touched
    }


def _sentences(text: str, source: Source) -> list[tuple[str, int]]:
    """Each sentence, heading, list item and line of code on one line, and where it begins."""
    if source.kind == "record":
        found, start = [], 0
        for said in line_sentences(text):
            start = max(text.find(said, start), start)
            found.append((one_line(said), start))
        return found
    cut = [(text[piece.start : piece.end], piece.start) for piece in pieces(text, source.form)]
    return [(one_line(said), start) for said, start in cut if said.strip()]
