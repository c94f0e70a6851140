"""Training prompts: cut at tokens, repeatable, and apart from the evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cartridge_distill.errors import ConfigError
from cartridge_distill.prompts import render_prompt
from cartridge_distill.records import Question, Record, load_questions, parse_records
from tests.data.templates import SMOLLM2
from training import prepare_data
from training.prepare_data import (
    Guard,
    choose_patients,
    cut_points,
    make_rows,
    sections,
    sentences,
)

DATA = Path(__file__).parents[2] / "training" / "data"


@pytest.fixture(scope="module")
def demo() -> list[Record]:
    return parse_records((DATA / "demo.json").read_text(), "demo.json")


@pytest.fixture(scope="module")
def clinic() -> list[Record]:
    return parse_records((DATA / "clinic.json").read_text(), "clinic.json")


@pytest.fixture(scope="module")
def bpe(demo: list[Record]) -> PreTrainedTokenizerFast:
    """A BPE tokenizer trained on the demo's document: tokens of several letters, as real ones."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([demo[0].document], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = SMOLLM2
    return tokenizer


def test_sentences_do_not_end_at_titles_and_initials() -> None:
    text = 'Mr. A. Bee saw Dr. Cee. "Fine," she said. It was 3.5 mg.\nNext line'
    assert sentences(text) == [
        "Mr. A. Bee saw Dr. Cee.",
        '"Fine," she said.',
        "It was 3.5 mg.",
        "Next line",
    ]


def test_headings_are_short_beginnings_with_a_colon(demo: list[Record]) -> None:
    assert [heading for heading, _ in sections(demo[0])] == [
        *("Home", "Admission", "Findings", "Treatment", "Problems", "Discharge")
    ]
    plain = Record("p", "n", "b", "d", ("Dear colleague, we saw: a lot of things.",), ())
    assert sections(plain)[0][0] is None or len(sections(plain)[0][0] or "") < 40


def test_cuts_fall_on_tokens_of_the_whole_sentence(bpe: PreTrainedTokenizerFast) -> None:
    user = {"role": "user", "content": "A question?"}
    for sentence in ("Her family doctor is Dr. Paul Renshaw.", "Grüße aus Ålesund, näher als Rom."):
        whole = render_prompt(bpe, [user, {"role": "assistant", "content": sentence}])
        head = len(render_prompt(bpe, [user]))
        starts = cut_points(bpe, sentence)
        assert starts
        for start in starts:
            ids = render_prompt(bpe, [user, {"role": "assistant", "content": start}])
            assert ids == whole[: len(ids)]
            assert head + 2 <= len(ids) < len(whole)


def test_no_cut_in_the_middle_of_a_letter_or_before_anything_is_said(
    bpe: PreTrainedTokenizerFast,
) -> None:
    assert all("\ufffd" not in start for start in cut_points(bpe, "日本語の文です。"))
    assert cut_points(bpe, "A") == []


def prompts(rows: list[dict[str, Any]]) -> list[str]:
    return [json.dumps(row["prompt"]) for row in rows]


@pytest.mark.parametrize("recipe", ["started", "open", "mixed"])
def test_rows_are_repeatable_and_of_the_kind_asked_for(
    bpe: PreTrainedTokenizerFast, demo: list[Record], recipe: str
) -> None:
    train, val = make_rows(bpe, demo, recipe, rows=300, val_rows=8, seed=3)
    again, _ = make_rows(bpe, demo, recipe, rows=300, val_rows=8, seed=3)
    other, _ = make_rows(bpe, demo, recipe, rows=300, val_rows=8, seed=4)
    assert train == again and train != other
    assert (len(train), len(val)) == (300, 8)
    kinds = {row["extra_info"]["kind"] for row in train}
    assert kinds == ({"started", "open"} if recipe == "mixed" else {recipe})
    for index, row in enumerate(train):
        info = row["extra_info"]
        assert (info["index"], info["split"], info["document_id"]) == (index, "train", "demo_01")
        last = row["prompt"][-1]
        assert last["role"] == ("assistant" if info["kind"] == "started" else "user")
        if info["kind"] == "started":
            assert last["content"] in demo[0].document
    if recipe == "started":
        cuts = {row["prompt"][-1]["content"] for row in train}
        assert not cuts & {row["prompt"][-1]["content"] for row in val}


def with_question(record: Record, question: str, stem: str | None) -> Record:
    asked = Question("demo_01", question, ("a", "b", "c", "d", "e"), 0, stem)
    return Record(**{**vars(record), "questions": (asked,)})


def test_cuts_that_hold_an_evaluation_stem_are_dropped_and_counted(
    bpe: PreTrainedTokenizerFast, demo: list[Record], capsys: pytest.CaptureFixture[str]
) -> None:
    # Another case and other punctuation do not hide it.
    colliding = with_question(demo[0], "?", "her family doctor is, Dr")
    train, val = make_rows(bpe, [colliding], "started", rows=600, val_rows=4, seed=0)
    starts = {row["prompt"][-1]["content"] for row in train + val}
    assert not any(start.startswith("Her family doctor is Dr") for start in starts)
    assert any(start.startswith("Her next visit") for start in starts)
    dropped = int(capsys.readouterr().out.split("started answers, ")[1].split(" ")[0])
    assert dropped > 0


def test_an_open_prompt_that_is_an_evaluation_question_is_left_out(
    bpe: PreTrainedTokenizerFast, demo: list[Record]
) -> None:
    colliding = with_question(demo[0], "List the facts that the record gives about home.", None)
    train, _ = make_rows(bpe, [colliding], "open", rows=100, val_rows=4, seed=0)
    assert all("facts that the record gives about home" not in text for text in prompts(train))


def test_a_collision_that_slipped_through_is_an_error(demo: list[Record]) -> None:
    guard = Guard(demo[0].questions)
    row = {
        "patient_id": "p",
        "prompt": [{"role": "user", "content": "So: where does the PATIENT live"}],
    }
    with pytest.raises(ConfigError, match="'where does the patient live'"):
        guard.check([row])


def test_with_several_patients_prompts_and_questions_say_whom_they_mean(
    bpe: PreTrainedTokenizerFast, clinic: list[Record]
) -> None:
    train, _ = make_rows(bpe, clinic, "mixed", rows=200, val_rows=4, seed=0)
    names = {record.document_id: record.name for record in clinic}
    assert {row["patient_id"] for row in train} == set(names)
    for row in train:
        assert names[row["patient_id"]] in row["prompt"][0]["content"]
    for question in prepare_data.evaluation_questions(clinic):
        assert names[question.document_id] in question.question


def test_texts_without_headings_get_open_prompts_too(bpe: PreTrainedTokenizerFast) -> None:
    letter = Record("p", "A B", "1", "d", ("Dear colleague\nWe saw her on Monday.",), ())
    train, _ = make_rows(bpe, [letter], "open", rows=10, val_rows=1, seed=0)
    assert len(set(prompts(train))) == 10


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("other", 10, 2), "'other' is unknown"),
        (("started", 0, 2), "not 0"),
        (("started", 10, 10_000), "fewer --val-rows"),
    ],
)
def test_bad_requests_are_refused(
    bpe: PreTrainedTokenizerFast, demo: list[Record], arguments: tuple[str, int, int], says: str
) -> None:
    recipe, rows, val_rows = arguments
    with pytest.raises(ConfigError, match=says):
        make_rows(bpe, demo, recipe, rows, val_rows, seed=0)


def test_patients_are_chosen_by_name(clinic: list[Record]) -> None:
    assert [r.document_id for r in choose_patients(clinic, ["clinic_02"])] == ["clinic_02"]
    assert len(choose_patients(clinic, None)) == 2
    with pytest.raises(ConfigError, match="no patient 'p9'; there are: clinic_01, clinic_02"):
        choose_patients(clinic, ["p9"])
    with pytest.raises(ConfigError, match="twice"):
        choose_patients(clinic, ["clinic_01", "clinic_01"])


def test_the_command_writes_what_verl_and_the_teacher_read(
    bpe: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    bpe.save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "out"
    arguments = ["--tokenizer", str(tmp_path / "tokenizer"), "--out", str(out), "--rows", "40"]
    assert prepare_data.main([*arguments, "--val-rows", "4"]) == 0
    train = pd.read_parquet(out / "train.parquet")
    expected = ["prompt", "data_source", "patient_id", "correct_answer", "extra_info"]
    assert list(train.columns) == expected and len(train) == 40
    assert len(pd.read_parquet(out / "val.parquet")) == 4
    row = train.iloc[0]
    assert [message["role"] for message in row["prompt"]] == ["user", "assistant"]
    assert set(row["extra_info"]) == {"index", "split", "document_id", "kind"}
    (document,) = map(json.loads, (out / "documents.jsonl").read_text().splitlines())
    assert set(document) == {"document_id", "text", "sha256"}
    assert len(load_questions(out / "eval.json")) >= 24


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tokenizer", "none", "--out", str(tmp_path)]
    assert prepare_data.main([*arguments, "--data", str(tmp_path / "absent.json")]) == 1
    assert "absent.json cannot be read" in capsys.readouterr().err
