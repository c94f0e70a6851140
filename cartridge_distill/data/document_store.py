"""The documents that a teacher may be asked to read, by id. Needs no model, and no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cartridge_distill.data.records import sha256_of
from cartridge_distill.util import json_text
from cartridge_distill.util.errors import DocumentError, with_fix
from cartridge_distill.util.lfs import refuse_pointers

_PREPARE = "write it with `cartridge-distill prepare`"
_SURROGATE = re.compile("[\ud800-\udfff]")


class DocumentStore:
    """Documents by id, from a ``.parquet`` or ``.jsonl`` file with ``document_id`` and ``text``.

    Raises:
        DocumentError: the file is missing, lacks a column, repeats an id, holds an empty text, or
            one that has another SHA-256 than stands beside it.
    """

    def __init__(self, texts: Mapping[str, str], source: str = "memory") -> None:
        for document_id, text in texts.items():
            if not isinstance(text, str) or not text.strip():
                raise DocumentError(
                    f"{source}: document {document_id!r} is empty; fix: write the file anew"
                )
            if not _is_text(text):
                raise DocumentError(
                    f"{source}: document {document_id!r} holds half a character (a lone "
                    "surrogate), which is no text; fix: write the file anew"
                )
        self._texts = dict(texts)
        self.source = source

    @classmethod
    def from_file(cls, path: str | Path) -> DocumentStore:
        """The documents of a ``.parquet`` or ``.jsonl`` file of ``document_id`` and ``text``.

        Raises:
            DocumentError: it is not there or cannot be read, or a row is wrong; the row is named.
        """
        path = Path(path)
        if not path.is_file():
            raise DocumentError(
                f"documents file {path} does not exist; fix: `cartridge-distill prepare` writes it"
            )
        if path.suffix not in (".parquet", ".jsonl"):
            raise DocumentError(f"documents file {path}; fix: name one of .parquet or .jsonl")
        try:
            rows = _rows(path)
        except (OSError, ValueError) as error:
            raise DocumentError(
                with_fix(f"documents file {path} cannot be read: {error}", _PREPARE)
            ) from error
        texts: dict[str, str] = {}
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise DocumentError(
                    f"{path}, row {number}: a {type(row).__name__}, not an object; fix: {_PREPARE}"
                )
            if "document_id" not in row or "text" not in row:
                raise DocumentError(
                    f"{path}, row {number}: needs document_id and text, has {sorted(row)}; fix: "
                    "add what is missing"
                )
            if not isinstance(row["document_id"], str) or not row["document_id"]:
                raise DocumentError(
                    f"{path}, row {number}: document_id is {row['document_id']!r}; fix: give a text"
                )
            if row["document_id"] in texts:
                raise DocumentError(
                    f"{path}: document {row['document_id']!r} appears twice; fix: take one out"
                )
            written, text = row.get("sha256"), row["text"]
            if isinstance(written, str) and _is_text(text) and written != sha256_of(text):
                raise DocumentError(
                    f"{path}: the text of document {row['document_id']!r} is not the one that was "
                    f"written: SHA-256 {sha256_of(text)}, and sha256={written!r:.80} stands beside "
                    "it; fix: take another copy of the file, or, if you changed the text by hand, "
                    "take sha256 out of its row"
                )
            texts[row["document_id"]] = text
        if not texts:
            raise DocumentError(f"{path} holds no document; fix: {_PREPARE}")
        return cls(texts, str(path))

    @property
    def ids(self) -> list[str]:
        """All ids, in the order of the file."""
        return list(self._texts)

    def text(self, document_id: str) -> str:
        """Raises DocumentError, naming the id, when the document is not there."""
        if document_id not in self._texts:
            known = ", ".join(self.ids[:5]) + (", ..." if len(self.ids) > 5 else "")
            raise DocumentError(
                f"document {document_id!r} is not in {self.source} (it has: {known}), and without "
                f"it the teacher would be the bare model; fix: {_PREPARE}, the rows with it"
            )
        return self._texts[document_id]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not _SURROGATE.search(value)


def _rows(path: Path) -> list[Any]:
    """Raises OSError or ValueError."""
    refuse_pointers(path)
    if path.suffix == ".parquet":
        from cartridge_distill.util.parquet import read_rows

        return read_rows(path).to_dict("records")
    found = []
    for number, line in enumerate(json_text.decode(path.read_bytes()).split("\n"), 1):
        try:
            found += [json_text.loads(line)] if line.strip() else []
        except json_text.JsonError as error:
            raise ValueError(f"line {number} {error}") from error
    return found
