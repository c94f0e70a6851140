"""The folder that training and evaluation read: prompts in veRL's schema, each document once.

    train.parquet     the prompts that are trained on
    val.parquet       prompts of the same schema that are kept aside
    documents.jsonl   what the teacher reads, by id; a prompt names it in extra_info
    eval.json         multiple-choice questions; an empty list where there are none

docs/data.md has the columns. All prompt recipes write the same ones, so that several folders'
files can be given to veRL together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cartridge_distill.data.decontamination import Guard, check_held_out
from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.data.documents.source import Source
from cartridge_distill.data.records import Question, save_documents, save_questions
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.parquet import write_table

Row = dict[str, Any]

FILES = ("train.parquet", "val.parquet", "documents.jsonl", "eval.json")

SCHEMA = pa.schema(
    {
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "data_source": pa.string(),
        "patient_id": pa.string(),
        "correct_answer": pa.string(),
        "extra_info": pa.struct(
            {
                "index": pa.int64(),
                "split": pa.string(),
                "document_id": pa.string(),
                "recipe": pa.string(),
                "kind": pa.string(),
                "chunk": pa.string(),
                "seed": pa.int64(),
            }
        ),
    }
)


def make_row(
    source: Source,
    document_id: str,
    messages: Sequence[dict[str, str]],
    prompt_recipe: str,
    kind: str,
    answer: str = "",
    chunk: str | None = None,
    seed: int | None = None,
) -> Row:
    """One prompt.

    Args:
        source: the document it is about.
        document_id: the part of it that the teacher reads.
        messages: the conversation; ends with the user, or with a started answer.
        prompt_recipe, kind: what made it, and which of its kinds it is.
        answer: how the document goes on, for a started answer.
        chunk: `start:end`, the characters of the teacher's document it was written from.
        seed: what it was drawn with.
    """
    return {
        "prompt": list(messages),
        "data_source": "cartridge_distill",
        "patient_id": source.document_id,
        "correct_answer": answer,
        "extra_info": {
            "document_id": document_id,
            "recipe": prompt_recipe,
            "kind": kind,
            "chunk": chunk,
            "seed": seed,
        },
    }


def numbered(rows: Iterable[Row], split: str) -> list[Row]:
    """With each row's index and split, in veRL's place for them."""
    return [
        {**row, "extra_info": {"index": index, "split": split, **row["extra_info"]}}
        for index, row in enumerate(rows)
    ]


def alternate(makers: Sequence[Iterator[Row]]) -> Iterator[Row]:
    """One of each maker in turn."""
    while True:
        for maker in makers:
            yield next(maker)


def evaluation_questions(sources: Sequence[Source]) -> list[Question]:
    """All questions; with several documents each one says which it is about."""
    if len(sources) == 1:
        return list(sources[0].questions)
    return [
        replace(question, question=f"{question.question} ({source.title})")
        for source in sources
        for question in source.questions
    ]


def check_replaceable(out: Path) -> None:
    """Raises ConfigError when the folder's files were not written by :func:`write_dataset`."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; fix: name a folder")
    there = [name for name in FILES if (out / name).exists()]
    if not there:
        return
    try:
        columns = pq.read_schema(out / FILES[0]).names  # it is the first that is written
    except (pa.ArrowException, OSError):
        columns = []
    if columns != SCHEMA.names:
        raise ConfigError(
            f"--out {out} holds {', '.join(there)}, which this command did not write; fix: name "
            "another folder, or move them away"
        )


def check_same_documents(out: Path, sources: Sequence[Source]) -> None:
    """Is what lies in the folder of the same documents? A run may be training on them.

    Raises:
        ConfigError: it is of others.
    """
    file = out / FILES[2]
    if not file.is_file():
        return
    there = DocumentStore.from_file(file)
    before = {name: there.text(name) for name in there.ids}
    now = {part.document.document_id: part.document.text for s in sources for part in s.parts}
    if before == now:
        return
    gone = sorted(name for name in before if before[name] != now.get(name))
    what = f"of other documents ({', '.join(gone[:3])}, ...)" if gone else "of fewer documents"
    raise ConfigError(
        f"--out {out} holds what was prepared {what}; fix: name another folder, or --overwrite it"
    )


def write_dataset(
    out: Path, sources: Sequence[Source], train: Sequence[Row], val: Sequence[Row]
) -> None:
    """Writes the folder.

    Raises:
        ConfigError: an evaluation question is among the prompts, or a held-out prompt among those
            to be trained on, or the folder holds files of these names that are of another origin;
            nothing is written then.
    """
    check_replaceable(out)
    guard = Guard([question for source in sources for question in source.questions])
    guard.check([*train, *val])
    check_held_out(train, val)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("val", val)):
        write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), out / f"{name}.parquet")
    save_documents(
        out / "documents.jsonl", [part.document for source in sources for part in source.parts]
    )
    save_questions(out / "eval.json", evaluation_questions(sources))
