"""What is evaluated on: questions, held-out prompts and documents, from a data folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.data.general import is_general
from cartridge_distill.data.records import Question, load_questions
from cartridge_distill.model.prompts import Message, render_prompt
from cartridge_distill.util.errors import ConfigError, DocumentError
from cartridge_distill.util.parquet import read_rows

QUESTIONS = "eval.json"
PROMPTS = "val.parquet"
DOCUMENTS = "documents.jsonl"
_WRITE_IT = "fix: write the data anew with `cartridge-distill prepare`"


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt that is not trained on.

    Attributes:
        document_id: of the document it is about.
        asked: what the user says; retrieval's query.
        text: the whole conversation, the beginning of the answer with it.
        ids: the prompt's token ids.
    """

    document_id: str
    asked: str
    text: str
    ids: list[int]

    @classmethod
    def of(cls, tokenizer: Any, document_id: str, messages: Sequence[Message]) -> HeldOutPrompt:
        said = [str(message["content"]) for message in messages if message["role"] == "user"]
        text = "\n".join(str(message["content"]) for message in messages)
        ids = render_prompt(tokenizer, messages)
        return cls(document_id, "\n".join(said), text, ids)


def load_prompts(
    path: Path, tokenizer: Any, document_key: str = "document_id"
) -> list[HeldOutPrompt]:
    """Reads prompts in veRL's schema: ``prompt`` (messages) and ``extra_info`` with the document.

    General rows are about no document and are left out.

    Raises:
        ConfigError: the file is missing or damaged, has other columns, or a row names no document.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is not there; fix: `cartridge-distill prepare` writes it")
    rows = read_rows(path)
    missing = {"prompt", "extra_info"} - set(rows.columns)
    if missing:
        raise ConfigError(f"{path} has no column {sorted(missing)[0]!r}; {_WRITE_IT}")
    found = []
    for number, (messages, info) in enumerate(zip(rows["prompt"], rows["extra_info"], strict=True)):
        if is_general(info):
            continue
        document_id = (info or {}).get(document_key)
        if document_id is None:
            raise ConfigError(
                f"{path}, row {number}: extra_info has no {document_key!r}; {_WRITE_IT}"
            )
        found.append(HeldOutPrompt.of(tokenizer, str(document_id), list(messages)))
    return found


@dataclass(frozen=True)
class EvaluationData:
    """Questions, held-out prompts and the documents both are about."""

    questions: list[Question]
    prompts: list[HeldOutPrompt]
    documents: DocumentStore

    @classmethod
    def from_folder(
        cls, folder: Path, tokenizer: Any, with_prompts: bool = False, limit: int | None = None
    ) -> EvaluationData:
        """Reads a folder of ``cartridge-distill prepare``.

        Args:
            with_prompts: the held-out prompts, too; they are taken in any case where there are no
                questions.
            limit: as many questions, and as many prompts, at most.

        Raises:
            ConfigError: a file is missing or not what it should be; there is nothing to evaluate.
            DocumentError: a document is missing.
        """
        questions = load_questions(folder / QUESTIONS) if (folder / QUESTIONS).is_file() else []
        prompts = []
        if with_prompts or not questions:
            prompts = load_prompts(folder / PROMPTS, tokenizer)
        if not questions and not prompts:
            raise ConfigError(
                f"{folder} has no evaluation questions and no held-out prompts; {_WRITE_IT}"
            )
        documents = DocumentStore.from_file(folder / DOCUMENTS)
        check_documents([*questions, *prompts], documents)
        return cls(questions[:limit], prompts[:limit], documents)


class AboutADocument(Protocol):
    """A question or a prompt."""

    @property
    def document_id(self) -> str: ...


D = TypeVar("D", bound=AboutADocument)


def check_documents(items: Sequence[AboutADocument], documents: DocumentStore) -> None:
    """Are the documents there that are asked about?

    Raises:
        DocumentError: one is not, or was cut into parts.
    """
    for document_id in dict.fromkeys(item.document_id for item in items):
        if document_id in documents.ids:
            continue
        parts = [known for known in documents.ids if known.startswith(f"{document_id}#")]
        if parts:
            raise DocumentError(
                f"The evaluation asks about {document_id!r}, which was cut into {len(parts)} "
                "parts, for the model's context does not hold it: no teacher can read it whole; "
                "fix: take a model with a longer context. Held-out prompts are about parts, and "
                f"are evaluated where {QUESTIONS} is not there"
            )
        raise DocumentError(
            f"The evaluation asks about the document {document_id!r}, which is not among the "
            f"documents of {documents.source} ({', '.join(documents.ids)}); {_WRITE_IT}"
        )


@dataclass(frozen=True)
class Numbered(Generic[D]):
    """An item with its place among all of its kind."""

    index: int
    item: D


def in_chunks(items: Sequence[D], size: int) -> Iterator[list[Numbered[D]]]:
    """Items of one document together, a few at a time."""
    by_document: dict[str, list[Numbered[D]]] = {}
    for index, item in enumerate(items):
        by_document.setdefault(item.document_id, []).append(Numbered(index, item))
    for members in by_document.values():
        for at in range(0, len(members), size):
            yield members[at : at + size]
