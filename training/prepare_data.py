"""Patient records to veRL's training files: prompts, documents, and the questions kept apart.

Reads LongHealth's JSON schema (its `benchmark_v5.json`, or the fictional records in
`training/data/`) and writes into one folder:

    train.parquet, val.parquet   prompts in veRL's schema; their document is named by its id
    documents.jsonl              each document once: document_id, text, sha256
    eval.json                    the multiple-choice questions, none of which is trained on

Two kinds of training prompts. *Started*: the user asks about a section, and the assistant's answer
has already begun with a true sentence of the document, cut at a random token; the student goes on
from there. This is what teaches a small model. *Open*: questions about a section, for models that
can answer them. No prompt ever contains an evaluation question or the stem of one: colliding cuts
are dropped and counted, and the result is checked once more before it is written.

Not done here: answers. They are sampled from the student as it trains, and the teacher, who has
the document, judges them; there is no reward.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cartridge_distill.errors import CartridgeDistillError, ConfigError
from cartridge_distill.prompts import render_document, render_prompt
from cartridge_distill.records import (
    Document,
    Question,
    Record,
    parse_records,
    save_documents,
    save_questions,
)

LONGHEALTH = "https://raw.githubusercontent.com/kbressem/LongHealth/main/data/benchmark_v5.json"
RECIPES = ("started", "open", "mixed")
DEFAULT_DATA = Path(__file__).parent / "data" / "demo.json"

# Short, because every token of the user's turn is paid for in each of the three forwards.
STARTED_TURNS = (
    "Tell me about {section}.",
    "Describe {section}.",
    "What about {section}?",
    "{section}?",
)
OPEN_TURNS = (
    "Summarize what the record says about {section}.",
    "Which names, places and numbers does the record give about {section}?",
    "Explain {section} to the patient's family in plain words.",
    "List the facts that the record gives about {section}.",
    "Write three questions about {section} and answer them from the record.",
    "What should a new doctor know about {section}?",
)
# What a text without a heading of its own is asked about.
OPEN_TOPICS = (
    "the diagnoses",
    "the medication",
    "the laboratory values",
    "the imaging",
    "the operations and procedures",
    "the course of the illness",
    "the patient's history",
    "the plan after discharge",
)
_HEADING = re.compile(r"^\W*([A-Z][\w ,/&-]{1,38}):\s")
# A full stop after one of these, or after an initial, does not end a sentence.
_NO_END = r"".join(rf"(?<!\b{word}\.)" for word in ("Dr", "Mr", "Mrs", "Ms", "Prof", "St", "[A-Z]"))
_SENTENCE_END = re.compile(rf"{_NO_END}(?<=[.!?])\s+(?=[A-Z\"'(])|\n+")


@dataclass(frozen=True)
class Cut:
    """The beginning of a sentence, to be continued: one started answer less its user turn."""

    record: Record
    section: str
    start: str
    rest: str


def sections(record: Record) -> list[tuple[str | None, str]]:
    """(heading or None, body) of each text; a heading is a short beginning that ends in a colon."""
    found: list[tuple[str | None, str]] = []
    for text in record.texts:
        heading = _HEADING.match(text)
        if heading:
            found.append((heading.group(1).strip(), text[heading.end() :].strip()))
        else:
            found.append((None, text))
    return found


def sentences(text: str) -> list[str]:
    """Splits at sentence ends and line breaks; titles and initials do not end a sentence."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def cut_points(tokenizer: PreTrainedTokenizerBase, sentence: str) -> list[str]:
    """The beginnings of a sentence at which a started answer may stop.

    They lie in the later half of the sentence, at least 2 tokens in, before the last word: what is
    new in a sentence comes late, and there the teacher knows what the student does not. A cut
    counts only if its text, tokenised again behind the rendered prompt, gives the very tokens that
    the whole sentence begins with: the student must go on from a token sequence that the sentence
    itself could have.
    """

    def render(answer: str) -> list[int]:
        user = {"role": "user", "content": "?"}
        return render_prompt(tokenizer, [user, {"role": "assistant", "content": answer}])

    head, whole = render(""), render(sentence)
    if whole[: len(head)] != head:
        return []
    starts = []
    tokens = len(whole) - len(head)
    for cut in range(max(2, tokens // 2), max(3, tokens - 1)):
        end = len(head) + cut
        if end >= len(whole):
            break
        start = str(tokenizer.decode(whole[len(head) : end]))
        if sentence.startswith(start) and render(start) == whole[:end]:
            starts.append(start)
    return starts


def all_cuts(tokenizer: PreTrainedTokenizerBase, record: Record) -> list[Cut]:
    """Every cut of every sentence of a document."""
    cuts = [
        Cut(record, (heading or "the patient").lower(), start, sentence[len(start) :])
        for heading, body in sections(record)
        for sentence in sentences(body)
        for start in cut_points(tokenizer, sentence)
    ]
    say(f"{record.document_id}: {len(cuts)} places to cut a sentence at")  # Seconds each.
    return cuts


def normalised(text: str) -> str:
    """Lower case, punctuation dropped, single spaces; with a space at each end."""
    words = re.findall(r"[^\W_]+", text.lower())
    return f" {' '.join(words)} "


class Guard:
    """Knows the evaluation questions and stems, and finds them in a training prompt."""

    def __init__(self, questions: Sequence[Question]) -> None:
        texts = [text for q in questions for text in (q.question, q.stem) if text]
        self._kept_apart = sorted({normalised(text) for text in texts})

    def collision(self, text: str) -> str | None:
        """The evaluation text that `text` equals or contains, if any."""
        inside = normalised(text)
        return next((kept for kept in self._kept_apart if kept in inside), None)

    def check(self, rows: Sequence[dict[str, Any]]) -> None:
        """Raises ConfigError when a prompt holds an evaluation text."""
        for number, row in enumerate(rows):
            for message in row["prompt"]:
                kept = self.collision(message["content"])
                if kept:
                    raise ConfigError(
                        f"Training prompt {number} of {row['patient_id']!r} contains the "
                        f"evaluation text {kept.strip()!r}: {message['content']!r}. Evaluation "
                        "questions must not be trained on."
                    )


def shuffled_passes(items: Sequence[Any], rng: random.Random) -> Iterator[Any]:
    """All items in random order, over and over: even coverage at any number of rows."""
    while True:
        yield from rng.sample(items, len(items))


def started_rows(
    cuts: Sequence[Cut], rng: random.Random, name_patient: bool
) -> Iterator[dict[str, Any]]:
    for cut in shuffled_passes(cuts, rng):
        section = _about(cut.section, cut.record, name_patient)
        user = rng.choice(STARTED_TURNS).format(section=section)
        messages = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": cut.start},
        ]
        yield _row(cut.record, messages, cut.rest.strip(), "started")


def open_rows(
    records: Sequence[Record], guard: Guard, rng: random.Random, name_patient: bool
) -> Iterator[dict[str, Any]]:
    prompts = [
        (record, turn.format(section=_about(topic, record, name_patient)))
        for record in records
        for topic in _open_topics(record)
        for turn in OPEN_TURNS
    ]
    apart = [(record, text) for record, text in prompts if guard.collision(text) is None]
    if not apart:
        raise ConfigError("Every open prompt collides with an evaluation question.")
    for record, text in shuffled_passes(apart, rng):
        yield _row(record, [{"role": "user", "content": text}], "", "open")


def _open_topics(record: Record) -> list[str]:
    """Headings where the texts have them, else what medical letters are usually about."""
    headings = [heading.lower() for heading, _ in sections(record) if heading]
    return headings or list(OPEN_TOPICS)


def _about(section: str, record: Record, name_patient: bool) -> str:
    return f"{section} ({record.name})" if name_patient else section


def _row(record: Record, messages: list[dict[str, str]], answer: str, kind: str) -> dict[str, Any]:
    return {
        "prompt": messages,
        "data_source": "cartridge_distill",
        "patient_id": record.document_id,
        "correct_answer": answer,
        "extra_info": {"document_id": record.document_id, "kind": kind},
    }


def make_rows(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    recipe: str,
    rows: int,
    val_rows: int,
    seed: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(train, val) rows in veRL's schema; the same arguments give the same rows.

    The started answers of `val` are cuts that `train` does not have.

    Raises:
        ConfigError: unknown recipe, nothing to make prompts of, or a collision with evaluation.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"The recipe {recipe!r} is unknown; choose one of {', '.join(RECIPES)}.")
    if rows < 1 or val_rows < 1:
        raise ConfigError(f"At least one row each is needed, not {rows} (train), {val_rows} (val).")
    rng = random.Random(seed)
    guard = Guard([question for record in records for question in record.questions])
    name_patient = len(records) > 1
    makers: dict[str, list[Iterator[dict[str, Any]]]] = {"train": [], "val": []}
    if recipe in ("started", "mixed"):
        every = [cut for record in records for cut in all_cuts(tokenizer, record)]
        cuts = [cut for cut in every if guard.collision(cut.start) is None]
        say(f"{len(cuts)} started answers, {len(every) - len(cuts)} dropped: evaluation stems.")
        if len(cuts) <= val_rows:
            raise ConfigError(
                f"Only {len(cuts)} started answers can be made, and {val_rows} are kept for "
                "validation. Use longer documents, or fewer --val-rows."
            )
        rng.shuffle(cuts)
        makers["val"].append(started_rows(cuts[:val_rows], rng, name_patient))
        makers["train"].append(started_rows(cuts[val_rows:], rng, name_patient))
    if recipe in ("open", "mixed"):
        for maker in makers.values():
            maker.append(open_rows(records, guard, rng, name_patient))
    train, val = (
        _numbered(islice(_alternate(makers[split]), count), split)
        for split, count in (("train", rows), ("val", val_rows))
    )
    guard.check(train + val)
    return train, val


def _alternate(makers: Sequence[Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    while True:
        for maker in makers:
            yield next(maker)


def _numbered(rows: Iterator[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    numbered = list(rows)
    for index, row in enumerate(numbered):
        row["extra_info"] = {"index": index, "split": split, **row["extra_info"]}
    return numbered


def evaluation_questions(records: Sequence[Record]) -> list[Question]:
    """All questions; with several patients each one says whom it is about."""
    if len(records) == 1:
        return list(records[0].questions)
    return [
        replace(question, question=f"{question.question} ({record.name})")
        for record in records
        for question in record.questions
    ]


def read_source(data: str) -> str:
    """The JSON text of a file, of a URL, or of LongHealth itself (`longhealth`).

    Raises:
        ConfigError: it cannot be read.
    """
    data = LONGHEALTH if data == "longhealth" else data
    try:
        if data.startswith(("http://", "https://")):
            say(f"Downloading {data} ...")
            return httpx.get(data, follow_redirects=True, timeout=60).raise_for_status().text
        return Path(data).read_text()
    except (OSError, UnicodeDecodeError, httpx.HTTPError) as error:
        raise ConfigError(
            f"{data} cannot be read: {error}. Give a file or a URL with --data; without a network, "
            "copy LongHealth's data/benchmark_v5.json to this machine."
        ) from error


def choose_patients(records: Sequence[Record], wanted: Sequence[str] | None) -> list[Record]:
    """The records named, in the order named; all when none is named.

    Raises:
        ConfigError: an unknown patient id, or one named twice.
    """
    if not wanted:
        return list(records)
    by_id = {record.document_id: record for record in records}
    for patient in wanted:
        if patient not in by_id:
            raise ConfigError(f"There is no patient {patient!r}; there are: {', '.join(by_id)}.")
        if wanted.count(patient) > 1:
            raise ConfigError(f"--patients names {patient!r} twice.")
    return [by_id[patient] for patient in wanted]


def write(
    out: Path,
    records: Sequence[Record],
    train: Sequence[dict[str, Any]],
    val: Sequence[dict[str, Any]],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("val", val)):
        pq.write_table(pa.Table.from_pylist(list(rows)), out / f"{name}.parquet")
    documents = [Document.of(record.document_id, record.document) for record in records]
    save_documents(out / "documents.jsonl", documents)
    save_questions(out / "eval.json", evaluation_questions(records))


def say(line: str) -> None:
    print(line, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  python training/prepare_data.py --tokenizer MODEL_DIR --out data/demo\n"
            "  python training/prepare_data.py --data longhealth --patients patient_01 \\\n"
            "      --recipe mixed --rows 8192 --tokenizer meta-llama/Llama-3.2-3B-Instruct "
            "--out data/longhealth\n"
        ),
    )
    option = parser.add_argument
    option("--data", default=str(DEFAULT_DATA), help="JSON file or URL, or `longhealth`")
    option("--tokenizer", required=True, help="folder or hub id of the model to be trained")
    option("--out", type=Path, required=True, help="folder to write to")
    option("--patients", nargs="+", metavar="ID", help="which patients (default: all)")
    option("--recipe", choices=RECIPES, default="started", help="kind of prompts (%(default)s)")
    option("--rows", type=int, default=1920, help="training prompts to write (%(default)s)")
    option("--val-rows", type=int, default=16, help="held-out prompts to write (%(default)s)")
    option("--seed", type=int, default=0, help="same seed, same files (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        records = choose_patients(
            parse_records(read_source(options.data), options.data), options.patients
        )
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        train, val = make_rows(
            tokenizer, records, options.recipe, options.rows, options.val_rows, options.seed
        )
        write(options.out, records, train, val)
        for record in records:
            tokens = len(render_document(tokenizer, record.document))
            say(f"{record.document_id}: {tokens} tokens, {len(record.questions)} questions")
    except CartridgeDistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    say(f"Wrote {len(train)} training and {len(val)} validation prompts to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
