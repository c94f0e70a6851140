"""LongHealth's schema: what is read, and what is refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.data.documents.source import load_sources
from cartridge_distill.data.records import (
    Document,
    load_questions,
    parse_records,
    save_documents,
    save_questions,
)
from cartridge_distill.util.errors import CartridgeDistillError, ConfigError, DocumentError

DATA = Path(__file__).parents[2] / "cartridge_distill" / "data" / "examples"
QUESTION = {
    "question": "Who operated?",
    **{f"answer_{letter}": f"Dr. {letter.upper()}" for letter in "abcde"},
    "correct": "Dr. C",
}
RECORD = {
    "name": "Ann Other",
    "birthday": "1950-01-01",
    "diagnosis": "Hiccups",
    "texts": {"text_0": "Surgery: Dr. C operated.", "text_1": "She left.\n"},
    "questions": [QUESTION],
}


def parse(record: dict[str, Any]) -> Any:
    return parse_records(json.dumps({"p1": record}), "x.json")


def test_a_record_of_longhealth_is_read() -> None:
    (record,) = parse(RECORD)
    assert record.document == (
        "Patient record of Ann Other, born 1950-01-01. Diagnosis: Hiccups.\n\n"
        "Surgery: Dr. C operated.\n\nShe left."
    )
    (question,) = record.questions
    assert (question.document_id, question.correct, question.answer) == ("p1", 2, "Dr. C")
    assert question.stem is None


def change(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: record.update(values)


def in_question(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["questions"][0].update(values)


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda r: r.pop("texts"), ConfigError, r"x.json, patient 'p1': missing 'texts'"),
        (lambda r: (r.pop("name"), r.pop("birthday")), ConfigError, "missing 'name', 'birthday'"),
        (lambda r: r["questions"][0].pop("answer_d"), ConfigError, "question 0: missing 'answer_d"),
        (change(texts={}), DocumentError, "'p1' has no texts"),
        (change(texts={"text_0": " "}), DocumentError, "'text_0' is empty"),
        (change(texts=["a"]), ConfigError, "'texts' is no JSON object; fix: "),
        (change(questions={}), ConfigError, "'questions' is no JSON list; fix: "),
        (in_question(correct="Dr. Z"), ConfigError, "'Dr. Z' is not among the options"),
        (in_question(stem=" "), ConfigError, "'stem' is no text; fix: "),
        (change(birthday=None), ConfigError, "'p1': 'birthday' is null, not a text"),
        (change(name=" "), ConfigError, "'p1': 'name' is empty"),
        (change(diagnosis=["Hiccups"]), ConfigError, "'diagnosis' is a list"),
        (in_question(question=None), ConfigError, "question 0: 'question' is null"),
        (in_question(answer_b=None), ConfigError, "'answer_b' is null"),
        (in_question(answer_b=True), ConfigError, "'answer_b' is a bool"),
        (
            in_question(answer_b="Dr. D "),
            ConfigError,
            "question 0: the option 'Dr. D' stands there",
        ),
    ],
)
def test_bad_records_are_refused(
    damage: Callable[[dict[str, Any]], Any], error: type[CartridgeDistillError], says: str
) -> None:
    record = copy.deepcopy(RECORD)
    damage(record)
    with pytest.raises(error, match=says):
        parse(record)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{", "x.json is not JSON"),
        ("[]", "holds a list"),
        ("{}", "at least one patient"),
        ('{"p1": 1}', "'p1' is no JSON object; fix: "),
        ('{"p1": {}, "p1": {}}', "'p1' occurs twice"),
    ],
)
def test_bad_files_are_refused(source: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_records(source, "x.json")


def test_a_number_is_a_text_and_a_byte_order_mark_is_none(tmp_path: Path) -> None:
    (record,) = parse(RECORD | {"birthday": 1950})
    assert "born 1950." in record.document
    text = json.dumps({"p1": RECORD}, ensure_ascii=False)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "records.json").write_bytes(text.encode(encoding))
        [source] = load_sources(str(tmp_path / "records.json"), lambda line: None)
        assert source.document_id == "p1" and source.text == parse(RECORD)[0].document
    (tmp_path / "records.json").write_bytes(b'{"p\xff1": 1}')
    with pytest.raises(ConfigError, match="is no Unicode text"):
        load_sources(str(tmp_path / "records.json"), lambda line: None)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"correct": 5}, "correct=5 is not the place of one of 5 options"),
        ({"correct": -1}, "correct=-1"),
        ({"options": ["a", "b", "a"]}, "the option 'a' stands there twice"),
        ({"options": ["a", None]}, "empty or null; fix: fill it"),
        ({"question": None}, "empty or null; fix: fill it"),
        ({"weight": 3}, "not a file of evaluation questions.*weight"),
    ],
)
def test_an_evaluation_question_that_nobody_could_answer(
    tmp_path: Path, row: dict[str, Any], says: str
) -> None:
    good = {"document_id": "d", "question": "?", "options": list("abcde"), "correct": 2}
    file = tmp_path / "eval.json"
    file.write_text(json.dumps([good | row]))
    with pytest.raises(ConfigError, match=f"eval.json.*{says}"):
        load_questions(file)
    file.write_text(json.dumps([good]), encoding="utf-8-sig")
    assert load_questions(file)[0].answer == "c"
    file.write_text('[{"question": "?", "question": "!"}]')
    with pytest.raises(ConfigError, match="eval.json has a name twice: 'question'"):
        load_questions(file)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read: line 1 is not JSON"),
        (
            '{"document_id": "a", "text": "A"}\n{"document_id": null, "text": "A"}',
            "document_id is No",
        ),
        ('{"document_id": "a", "text": null}', "document 'a' is empty"),
        ('{"document_id": "a", "text": "A", "text": "B"}', "line 1 has a name twice: 'text'"),
        ("[1]", "row 0: a list"),
        ("version https://git-lfs.github.com/spec/v1\nsize 1", "Git LFS pointer"),
    ],
)
def test_a_file_of_documents_that_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "documents.jsonl"
    file.write_text(text)
    with pytest.raises(DocumentError, match=says):
        DocumentStore.from_file(file)
    file.write_text('{"document_id": "a", "text": "A"}\n', encoding="utf-8-sig")
    assert DocumentStore.from_file(file).ids == ["a"]
    (tmp_path / "documents.parquet").write_text("no parquet")
    with pytest.raises(DocumentError, match="documents.parquet cannot be read"):
        DocumentStore.from_file(tmp_path / "documents.parquet")


def test_questions_survive_their_file(tmp_path: Path) -> None:
    records = parse_records((DATA / "demo.json").read_text(), "demo.json")
    questions = list(records[0].questions)
    save_questions(tmp_path / "eval.json", questions)
    assert load_questions(tmp_path / "eval.json") == questions
    (tmp_path / "eval.json").write_text('[{"question": "?"}]')
    with pytest.raises(ConfigError, match="not a file of evaluation questions"):
        load_questions(tmp_path / "eval.json")


def test_the_teacher_reads_the_documents(tmp_path: Path) -> None:
    strange = 'Line\u2028separator, quote " and\nnew line'
    save_documents(tmp_path / "documents.jsonl", [Document.of("a", strange), Document.of("b", "B")])
    store = DocumentStore.from_file(tmp_path / "documents.jsonl")
    assert store.ids == ["a", "b"] and store.text("a") == strange


@pytest.mark.parametrize("name", ["demo.json", "clinic.json"])
def test_the_records_that_come_with_the_project(name: str) -> None:
    for record in parse_records((DATA / name).read_text(), name):
        for question in record.questions:
            assert question.stem is not None and len(set(question.options)) == 5
            if len(question.answer) > 4:  # The document holds the answer, and only that one.
                assert question.answer.lower() in record.document.lower()
