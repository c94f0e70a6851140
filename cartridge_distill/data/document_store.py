"""The documents that a teacher may be asked to read, by id. Needs no model, and no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cartridge_distill.util.errors import DocumentError


class DocumentStore:
    """Documents by id, from a ``.parquet`` or ``.jsonl`` file with ``document_id`` and ``text``.

    Raises:
        DocumentError: the file is missing, lacks a column, repeats an id or holds an empty text.
    """

    def __init__(self, texts: Mapping[str, str], source: str = "memory") -> None:
        for document_id, text in texts.items():
            if not isinstance(text, str) or not text.strip():
                raise DocumentError(f"{source}: document {document_id!r} is empty")
        self._texts = dict(texts)
        self.source = source

    @classmethod
    def from_file(cls, path: str | Path) -> DocumentStore:
        path = Path(path)
        if not path.is_file():
            raise DocumentError(
                f"documents file {path} does not exist; training/prepare_data.py writes it"
            )
        if path.suffix == ".parquet":
            import pandas as pd

            rows = pd.read_parquet(path).to_dict("records")
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        else:
            raise DocumentError(f"documents file {path}: expected .parquet or .jsonl")
        texts: dict[str, str] = {}
        for number, row in enumerate(rows):
            if "document_id" not in row or "text" not in row:
                raise DocumentError(
                    f"{path}, row {number}: needs document_id and text, has {sorted(row)}"
                )
            if row["document_id"] in texts:
                raise DocumentError(f"{path}: document {row['document_id']!r} appears twice")
            texts[row["document_id"]] = row["text"]
        if not texts:
            raise DocumentError(f"{path} holds no document")
        return cls(texts, str(path))

    @property
    def ids(self) -> list[str]:
        return list(self._texts)

    def text(self, document_id: str) -> str:
        """Raises DocumentError, naming the id, when the document is not there."""
        if document_id not in self._texts:
            known = ", ".join(self.ids[:5]) + (", ..." if len(self.ids) > 5 else "")
            raise DocumentError(
                f"document {document_id!r} is not in {self.source} (it has: {known}); without it "
                "the teacher would be the bare model"
            )
        return self._texts[document_id]
