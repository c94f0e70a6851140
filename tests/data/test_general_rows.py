"""General rows: an explicit label, spread among the others, never in what is held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cartridge_distill.data import command as prepare_data
from cartridge_distill.data.decontamination import Seen
from cartridge_distill.data.general import BARE, document_of, is_general
from cartridge_distill.data.general_rows import off_context_prompts, read_prompts, with_general
from cartridge_distill.data.prompt_length import PromptLimit
from cartridge_distill.evaluation.data import load_prompts
from cartridge_distill.util.errors import ConfigError, DocumentError
from tests.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def prepared(model: str, out: Path, *more: str) -> tuple[list[Any], list[Any]]:
    usual = ["--tokenizer", model, "--out", str(out), "--rows", "57", "--val-rows", "4"]
    assert prepare_data.main([*usual, *more]) == 0
    return tuple(pd.read_parquet(out / f"{n}.parquet").to_dict("records") for n in ("train", "val"))


def test_the_shipped_prompts_are_many_and_none_is_measured_and_trained_on() -> None:
    measured, trained = off_context_prompts(), read_prompts(None)
    assert len(measured) >= 100 and len(trained) >= 100
    seen = Seen()
    for text in (*measured, *trained):
        assert seen.like(text) is None, text
        seen.add(text)


def test_general_rows_are_a_fraction_of_all_and_spread_evenly(model: str, tmp_path: Path) -> None:
    train, val = prepared(model, tmp_path / "data", "--general-fraction", "0.05")
    general = [n for n, row in enumerate(train) if is_general(row["extra_info"])]
    assert len(train) == 60 and general == [10, 30, 50]
    assert [row["extra_info"]["index"] for row in train] == list(range(60))
    for row in train:
        document = document_of(row["extra_info"], "document_id", "a row")
        assert (document is BARE) == is_general(row["extra_info"])
    assert not any(is_general(row["extra_info"]) for row in val)
    before, _ = prepared(model, tmp_path / "without")
    kept = [row["prompt"][-1]["content"] for n, row in enumerate(train) if n not in general]
    assert kept == [row["prompt"][-1]["content"] for row in before]
    again, _ = prepared(model, tmp_path / "again", "--general-fraction", "0.05")
    assert [list(row["prompt"]) for row in again] == [list(row["prompt"]) for row in train]


def test_what_they_ask_may_be_ones_own(model: str, tmp_path: Path) -> None:
    own = [f"What is {n} plus {n + 1}?" for n in range(5)]
    text, lines = tmp_path / "own.txt", tmp_path / "own.jsonl"
    text.write_text("\n\n".join(own))
    lines.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in own))
    for file in (text, lines):
        assert read_prompts(file) == own
    options = ["--general-fraction", "0.2", "--general-prompts", str(text)]
    train, _ = prepared(model, tmp_path / "data", *options)
    asked = [row["prompt"][0]["content"] for row in train if is_general(row["extra_info"])]
    assert len(asked) == 14 and set(asked) == set(own)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.csv", "x", "a .txt file with a prompt a line"),
        ("a.txt", "one\n", "holds 1 prompts"),
        ("a.jsonl", '{"prompt": "x"}\n{"text": "y"}', 'line 2: no text in "prompt"'),
        ("a.jsonl", "{", "line 1"),
        ("a.txt", f"Hello?\n{off_context_prompts()[7].lower()}", "off_context_kl is measured"),
    ],
)
def test_a_file_that_makes_no_rows_is_refused(
    tmp_path: Path, name: str, text: str, problem: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--general-fraction", "1"], "to below 1"),
        (["--general-fraction", "-0.1"], "from 0"),
        (["--general-fraction", "0.001"], "is no row"),
        (["--general-fraction", "0.2", "--general-prompts", "there.txt"], "cannot be read"),
        (["--general-prompts", __file__], "would be ignored"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    problem: str,
) -> None:
    usual = ["--tokenizer", model, "--out", str(tmp_path / "x"), "--rows", "30"]
    assert prepare_data.main([*usual, *options]) == 1
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_prompts_over_the_limit_are_left_out() -> None:
    row = {"prompt": [], "extra_info": {"document_id": "d", "kind": "open"}}
    limit = PromptLimit(byte_tokenizer(), 40)
    found = with_general([row] * 9, ["Short?", "long " * 20], 0.5, 0, limit)
    asked = {each["prompt"][0]["content"] for each in found if is_general(each["extra_info"])}
    assert asked == {"Short?"} and len(found) == 18
    with pytest.raises(ConfigError, match="no general prompt is within --prompt-tokens 40"):
        with_general([row], ["long " * 20], 0.5, 0, limit)


def test_the_label_is_explicit() -> None:
    assert document_of({"document_id": "d", "kind": "open"}, "document_id", "row 1") == "d"
    assert document_of({"document_id": None, "kind": "general"}, "document_id", "row 1") is BARE
    assert document_of({"kind": "general"}, "document_id", "row 1") is BARE
    with pytest.raises(DocumentError, match="row 1 .*has no 'document_id'"):
        document_of({"document_id": None, "kind": "started"}, "document_id", "row 1")
    with pytest.raises(DocumentError, match="row 1 is labelled 'general' and names .*'d'"):
        document_of({"document_id": "d", "kind": "general"}, "document_id", "row 1")
    with pytest.raises(DocumentError, match="has no 'document_id'"):
        document_of(None, "document_id", "row 1")


def test_held_out_prompts_leave_general_rows_out(model: str, tmp_path: Path) -> None:
    train, _ = prepared(model, tmp_path / "data", "--general-fraction", "0.2")
    found = load_prompts(tmp_path / "data" / "train.parquet", byte_tokenizer())
    assert len(found) == 57 < len(train)
