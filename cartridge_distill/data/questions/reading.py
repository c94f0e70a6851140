"""A file of questions about one's own documents: CSV, JSON or JSON lines.

Columns, or names of the JSON objects:

    question   what is asked
    answer     the right answer, as short as it can be
    wrong      optional: wrong answers to choose from. In CSV one a column: `wrong`, `wrong_2`, ...;
               in JSON a list. Where there are none, answers to other questions about the same
               document stand in (`options.py`)
    document   which document answers it: its file name, or its id as `prepare` prints it; may be
               left out where there is one document
    stem       optional: the beginning of an answer sentence that the answers complete
    also       optional: other wordings of the right answer, which a free answer may have as well;
               in CSV `also`, `also_2`, ..., in JSON a list
    kind       optional: of question, by any name; a study takes its scores by kind
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cartridge_distill.data.documents.decoding import decode
from cartridge_distill.data.documents.source import Source
from cartridge_distill.data.questions.options import Asked, with_options
from cartridge_distill.data.words import normalised
from cartridge_distill.util import json_text
from cartridge_distill.util.errors import ConfigError, DocumentError, with_fix
from cartridge_distill.util.lfs import refuse_pointers

KINDS = (".csv", ".json", ".jsonl")
_NAMES = ("question", "answer", "wrong", "document", "stem", "also", "kind")
_LISTS = ("wrong", "also")
_NEEDED = ("question", "answer")


@dataclass(frozen=True)
class _Entry:
    """One entry of the file, checked by itself; `where` names it in messages."""

    where: str
    question: str
    answer: str
    wrong: tuple[str, ...]
    document: str | None
    stem: str | None
    also: tuple[str, ...]
    kind: str | None


def add_questions(sources: Sequence[Source], path: Path, seed: int) -> list[Source]:
    """The sources, cut into parts already, with the questions of a file behind those they have.

    Args:
        path: the file.
        seed: of the choice and the order of the answers.

    Raises:
        ConfigError: the file cannot be read, an entry is not what it must be, its document is not
            among the sources, or a document has one question alone and that has no wrong answers.
    """
    by_document: dict[str, list[Asked]] = {}
    for entry in _entries(path):
        source = _source_of(entry, sources)
        document_id = _document_id(entry, source)
        asked = Asked(
            *(entry.where, document_id, entry.question, entry.answer, entry.wrong),
            *(entry.stem, entry.also, entry.kind),
        )
        by_document.setdefault(source.document_id, []).append(asked)
    for source in sources:
        before = {normalised(question.question): "the records" for question in source.questions}
        for asked in by_document.get(source.document_id, []):
            key = normalised(asked.question)
            if key in before:
                raise ConfigError(
                    f"{asked.where}: {asked.question!r} is asked in {before[key]} already, about "
                    "the same document; fix: keep one of the two"
                )
            before[key] = asked.where
    return [
        replace(
            source,
            questions=(
                *source.questions,
                *with_options(by_document.get(source.document_id, []), seed),
            ),
        )
        for source in sources
    ]


def check_file(path: Path) -> None:
    """All that can be known of a file of questions before the documents are read.

    Raises:
        ConfigError: it cannot be read, or an entry is not what it must be.
    """
    _entries(path)


def _entries(path: Path) -> list[_Entry]:
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise ConfigError(f"--questions {path}; fix: give a file of {', '.join(KINDS)}")
    try:
        refuse_pointers(path)
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"--questions {path} cannot be read: {error.strerror}; fix: name another file"
        ) from error
    readers = {".csv": _csv_rows, ".json": _json_rows, ".jsonl": _json_lines}
    found = [_checked(where, row) for where, row in readers[kind](data, path)]
    if not found:
        raise ConfigError(f"--questions {path} holds no question; fix: write one, or name none")
    return found


def _csv_rows(data: bytes, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a table with a header; commas, semicolons and tabs are told apart by the header."""
    try:
        text = decode(data, str(path)).text
    except DocumentError as error:
        raise ConfigError(with_fix(f"--questions: {error}", "save it as UTF-8")) from error
    header = text.lstrip("\ufeff").partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    try:
        reader = csv.reader(io.StringIO(text.lstrip("\ufeff")), delimiter=delimiter, strict=True)
        names = [name.strip().lower() for name in next(reader, [])]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{path}: the column {name!r} stands there twice; fix: keep one")
        _check_names([_base(name) for name in names], f"{path}, first line")
        for values in reader:
            where = f"{path}:{reader.line_num}"
            if not any(value.strip() for value in values):
                continue
            if len(values) != len(names):
                raise ConfigError(
                    f"{where}: {len(values)} values for {len(names)} columns; fix: put quotes "
                    f"around a text that holds {delimiter!r}"
                )
            row: dict[str, Any] = {name: [] for name in _LISTS}
            for name, value in zip(names, values, strict=True):
                if _base(name) in _LISTS:
                    row[_base(name)] += [value] if value.strip() else []
                elif value.strip() or name in _NEEDED:
                    row[name] = value
            yield where, row
    except csv.Error as error:
        raise ConfigError(
            f"{path}:{reader.line_num}: not CSV: {error}; fix: save it as CSV"
        ) from error


def _base(name: str) -> str:
    """`wrong` for `wrong_2`, and alike."""
    head, _, number = name.rpartition("_")
    return head if head in _LISTS and number.isdecimal() else name


def _json_rows(data: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json_text.loads(json_text.decode(data))
    except json_text.JsonError as error:
        raise ConfigError(with_fix(f"--questions {path} {error}", "write JSON there")) from error
    if not isinstance(rows, list):
        raise ConfigError(
            f"--questions {path} holds a {type(rows).__name__}; fix: write a JSON list of objects "
            f"with {_listed(_NEEDED)}. Records in LongHealth's schema are documents, not questions"
        )
    for number, row in enumerate(rows, 1):
        yield f"{path}, question {number}", row


def _json_lines(data: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        for number, line in enumerate(json_text.decode(data).split("\n"), 1):
            if line.strip():
                yield f"{path}:{number}", json_text.loads(line)
    except json_text.JsonError as error:
        raise ConfigError(with_fix(f"--questions {path} {error}", "write JSON there")) from error


def _checked(where: str, row: Any) -> _Entry:
    """Raises ConfigError for a name that is unknown or missing, and a value that is no text."""
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where} is a {type(row).__name__}; fix: write an object")
    _check_names(list(row), where)
    return _Entry(
        where,
        _text(row["question"], "question", where),
        _text(row["answer"], "answer", where),
        _texts(row, "wrong", where),
        _optional(row, "document", where),
        _optional(row, "stem", where),
        _texts(row, "also", where),
        _optional(row, "kind", where),
    )


def _texts(row: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    """A list of texts; one text stands for a list of it, and null for none."""
    value = row.get(name)
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list):
        raise ConfigError(
            f"{where}: {name!r} is {json.dumps(value)[:60]}; fix: write a list of texts"
        )
    return tuple(_text(text, name, where) for text in values)


def _check_names(names: Sequence[Any], where: str) -> None:
    for name in names:
        if name not in _NAMES:
            near = difflib.get_close_matches(str(name), _NAMES, 1)
            meant = f"did you mean {near[0]!r}?" if near else f"one of {_listed(_NAMES)}"
            raise ConfigError(f"{where}: {name!r} is unknown; fix: {meant}")
    if missing := [name for name in _NEEDED if name not in names]:
        raise ConfigError(f"{where}: {_listed(missing)} is missing; fix: add it")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _text(value: Any, name: str, where: str) -> str:
    """A text; a number may be one."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        shown = "null" if value is None else f"a {type(value).__name__}"
        raise ConfigError(f"{where}: {name!r} is {shown}, not a text; fix: fill it")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {name!r} is {value}, no number; fix: write it as a text")
    if not str(value).strip():
        raise ConfigError(f"{where}: {name!r} is empty; fix: fill it")
    return " ".join(str(value).split())


def _optional(row: Mapping[str, Any], name: str, where: str) -> str | None:
    return None if row.get(name) is None else _text(row[name], name, where)


def _source_of(entry: _Entry, sources: Sequence[Source]) -> Source:
    """The document that an entry is about, by id, by a part's id, by file name or by title.

    Raises:
        ConfigError: none, or more than one.
    """
    if entry.document is None:
        if len(sources) == 1:
            return sources[0]
        raise ConfigError(
            f"{entry.where}: there are {len(sources)} documents; fix: say with 'document' which "
            f"one answers it ({_some(sources)})"
        )
    wanted = entry.document
    exact = [source for source in sources if wanted in (source.document_id, *_part_ids(source))]
    found = exact or [
        source
        for source in sources
        if wanted in (Path(source.document_id).name, Path(source.document_id).stem, source.title)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            f"{entry.where}: document {wanted!r} may be {_some(found)}; fix: write one of these"
        )
    near = difflib.get_close_matches(wanted, [source.document_id for source in sources], 1)
    meant = f"did you mean {near[0]!r}?" if near else f"name one of {_some(sources)}"
    raise ConfigError(f"{entry.where}: there is no document {wanted!r}; fix: {meant}")


def _part_ids(source: Source) -> list[str]:
    return [part.document.document_id for part in source.parts]


def _document_id(entry: _Entry, source: Source) -> str:
    """What the teacher reads to answer it: the document, or the one part that has the answer.

    Raises:
        ConfigError: the document was cut into parts, and not one alone holds the answer.
    """
    if len(source.parts) == 1 or entry.document in _part_ids(source):
        return entry.document if entry.document in _part_ids(source) else source.document_id
    answer = normalised(entry.answer)
    found = [part for part in source.parts if answer in normalised(part.document.text)]
    if len(found) == 1:
        return found[0].document.document_id
    raise ConfigError(
        f"{entry.where}: {source.document_id!r} was cut into {len(source.parts)} parts, for the "
        f"teacher does not read it whole, and {len(found)} of them hold the answer "
        f"{entry.answer!r}; fix: say with 'document' which one: {', '.join(_part_ids(source)[:20])}"
    )


def _some(sources: Sequence[Source]) -> str:
    names = [repr(source.document_id) for source in sources]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
