"""Patient records in LongHealth's JSON schema: reading, checking, and the document's text.

    {id: {name, birthday, diagnosis, texts: {text_0: ...},
          questions: [{question, answer_a ... answer_e, correct, stem?}]}}

`stem` is an optional key of ours: the beginning of an answer sentence that each option completes.
LongHealth (github.com/kbressem/LongHealth) has no stems. Other keys are ignored.

The evaluation questions travel as `eval.json` (`save_questions`, `load_questions`), the documents
as `documents.jsonl` (`save_documents`; `teacher.DocumentStore` reads it), each document once.

Not done here: training prompts (`prompt_recipes.py`, `self_study/`) and anything with tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cartridge_distill.util import json_text
from cartridge_distill.util.errors import ConfigError, DocumentError, with_fix

_LISTS, _OPTIONAL = ("options", "also"), ("also", "kind")  # of a question in `eval.json`
_AS_LONGHEALTH = (
    "write a JSON object {patient id: record} with at least one patient, as LongHealth's "
    "benchmark_v5.json"
)
_PREPARE = "write it with `cartridge-distill prepare`"
OPTION_KEYS = ("answer_a", "answer_b", "answer_c", "answer_d", "answer_e")


@dataclass(frozen=True)
class Question:
    """A multiple-choice question about one document.

    Attributes:
        document_id: the document that answers it.
        question: the user's turn.
        options: the texts to choose from.
        correct: index of the right option.
        stem: beginning of an answer sentence that each option completes, or None.
        also: other wordings of the right answer, that a free answer may have as well.
        kind: of question, by whatever name its author gave it; scores can be taken by kind.
    """

    document_id: str
    question: str
    options: tuple[str, ...]
    correct: int
    stem: str | None = None
    also: tuple[str, ...] = ()
    kind: str | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError where nobody could tell which answer is right."""
        texts = (self.document_id, self.question, *self.options)
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ConfigError(
                "a question's id, its text or one of its options is empty or null; fix: fill it"
            )
        if type(self.correct) is not int or not 0 <= self.correct < len(self.options):
            raise ConfigError(
                f"correct={self.correct!r} is not the place of one of {len(self.options)} options; "
                f"fix: give a number from 0 to {len(self.options) - 1}"
            )
        twice = [option for option in self.options if self.options.count(option) > 1]
        if twice:
            raise ConfigError(
                f"the option {twice[0]!r} stands there twice; fix: give each a text of its own"
            )
        if not all(isinstance(text, str) and text.strip() for text in self.also):
            raise ConfigError(
                "another wording of a right answer ('also') is empty or no text; fix: fill it, or "
                "take it out"
            )
        if wrong := [text for text in self.also if text in self.options]:
            raise ConfigError(
                f"{wrong[0]!r} is an option, and another wording of the right answer; fix: keep "
                "one of them"
            )

    @property
    def answer(self) -> str:
        """The right option's text."""
        return self.options[self.correct]

    @property
    def wordings(self) -> tuple[str, ...]:
        """Every wording of the right answer, the option's first."""
        return self.answer, *self.also


@dataclass(frozen=True)
class Record:
    """One patient: a document of several texts, and the questions about it."""

    document_id: str
    name: str
    birthday: str
    diagnosis: str
    texts: tuple[str, ...]
    questions: tuple[Question, ...]

    @property
    def document(self) -> str:
        """The document's text: a heading line, then the texts, with blank lines between."""
        heading = f"Patient record of {self.name}, born {self.birthday}."
        return "\n\n".join([f"{heading} Diagnosis: {self.diagnosis}.", *self.texts])


@dataclass(frozen=True)
class Document:
    """A document as the teacher reads it: a line of `documents.jsonl`.

    Attributes:
        document_id: what prompts name it by; `<parent>#<n>` for a part of a longer one.
        text: all of it.
        sha256: of the text.
        title: of the document, where it has one of its own.
        parent_id, parent_sha256: the whole document that this is a part of; None for a whole one.
    """

    document_id: str
    text: str
    sha256: str
    title: str | None = None
    parent_id: str | None = None
    parent_sha256: str | None = None

    @classmethod
    def of(cls, document_id: str, text: str, title: str | None = None) -> Document:
        """A document with the hash of its text."""
        return cls(document_id, text, sha256_of(text), title)


def sha256_of(text: str) -> str:
    """Of the text in UTF-8, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def parse_records(text: str, source: str) -> list[Record]:
    """Reads and checks the records of a JSON text.

    Args:
        text: the JSON.
        source: where it is from, for the messages.

    Raises:
        ConfigError: not JSON, duplicate ids, missing keys, or a right answer that is no option;
            each names the patient and the key.
        DocumentError: a patient's text is empty.
    """
    try:
        data = json_text.loads(text)
    except json_text.JsonError as error:
        raise ConfigError(with_fix(f"{source} {error}", _AS_LONGHEALTH)) from error
    if not isinstance(data, dict) or not data:
        raise ConfigError(
            f"{source} holds {'no patient' if data == {} else f'a {type(data).__name__}'}; fix: "
            f"{_AS_LONGHEALTH}"
        )
    return [_record(document_id, entry, source) for document_id, entry in data.items()]


def _record(document_id: str, entry: Any, source: str) -> Record:
    where = f"{source}, patient {document_id!r}"
    _need(entry, ("name", "birthday", "diagnosis", "texts", "questions"), where)
    for key, kind, name in (("texts", dict, "object"), ("questions", list, "list")):
        if not isinstance(entry[key], kind):
            raise ConfigError(f"{where}: {key!r} is no JSON {name}; fix: write one")
    if not entry["texts"]:
        raise DocumentError(f"{where} has no texts; fix: give it at least one")
    for key, text in entry["texts"].items():
        if not isinstance(text, str) or not text.strip():
            raise DocumentError(f"{where}: {key!r} is empty; fix: fill it, or take the key out")
    return Record(
        document_id=document_id,
        name=_text(entry, "name", where),
        birthday=_text(entry, "birthday", where),
        diagnosis=_text(entry, "diagnosis", where),
        texts=tuple(text.strip() for text in entry["texts"].values()),
        questions=tuple(
            _question(document_id, question, f"{where}, question {number}")
            for number, question in enumerate(entry["questions"])
        ),
    )


def _question(document_id: str, entry: Any, where: str) -> Question:
    _need(entry, ("question", *OPTION_KEYS, "correct"), where)
    options = tuple(_text(entry, key, where) for key in OPTION_KEYS)
    correct = _text(entry, "correct", where)
    if correct not in options:
        raise ConfigError(
            f"{where}: the right answer {correct!r} is not among the options {list(options)}; "
            "fix: repeat the text of one of them in `correct`"
        )
    stem = entry.get("stem")
    if stem is not None and (not isinstance(stem, str) or not stem.strip()):
        raise ConfigError(
            f"{where}: 'stem' is no text; fix: give the words that the options complete, or take "
            "the key out"
        )
    question = _text(entry, "question", where)
    try:
        return Question(
            document_id, question, options, options.index(correct), stem.strip() if stem else None
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    """A value that becomes text; a number may be one, and null is none."""
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        shown = "null" if value is None else f"a {type(value).__name__}"
        raise ConfigError(f"{where}: {key!r} is {shown}, not a text; fix: fill it")
    if not str(value).strip():
        raise ConfigError(f"{where}: {key!r} is empty; fix: fill it")
    return str(value).strip()


def _need(entry: Any, keys: Iterable[str], where: str) -> None:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where} is no JSON object; fix: write one")
    missing = [key for key in keys if key not in entry]
    if missing:
        names = ", ".join(repr(key) for key in missing)
        raise ConfigError(f"{where}: missing {names}; fix: add it, or them")


def save_questions(path: Path, questions: Iterable[Question]) -> None:
    """Writes `eval.json`: a list of questions, without the keys that say nothing."""
    plain = [asdict(question) for question in questions]
    rows = [{k: v for k, v in row.items() if k not in _OPTIONAL or v} for row in plain]
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_questions(path: Path) -> list[Question]:
    """Reads what `save_questions` wrote.

    Raises:
        ConfigError: the file is not such a list.
    """
    try:
        rows = json_text.load(path)
        return [
            Question(**{**row, **{k: tuple(row[k]) for k in _LISTS if k in row}}) for row in rows
        ]
    except json_text.JsonError as error:
        raise ConfigError(with_fix(f"{path} {error}", _PREPARE)) from error
    except ConfigError as error:
        raise ConfigError(with_fix(f"{path}: {error}", _PREPARE)) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is not a file of evaluation questions ({error!r}); fix: {_PREPARE}"
        ) from error


def save_documents(path: Path, documents: Iterable[Document]) -> None:
    """Writes `documents.jsonl`: a document a line, without the keys that are None."""
    rows = (asdict(document).items() for document in documents)
    lines = [json.dumps({k: v for k, v in row if v is not None}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
