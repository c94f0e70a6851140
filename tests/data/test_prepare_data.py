"""The command: records and folders to what veRL, the teacher and the evaluation read."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from cartridge_distill.data import command as prepare_data
from cartridge_distill.data.dataset import SCHEMA
from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.data.limits import PROMPT_TOKENS, RESPONSE_TOKENS
from cartridge_distill.data.prompt_length import prompts_of
from cartridge_distill.data.records import load_questions
from cartridge_distill.distill.teacher import Teacher
from cartridge_distill.model.prompts import render_document, render_prompt
from cartridge_distill.model.reading import read_tokenizer
from tests.data.documents.made import prose, sentence, write_pdf
from tests.data.writer import CONTEXT, writing_model
from tests.tiny import byte_tokenizer
from verl_patches.launching.settings import CONFIG_FOLDER, CONFIG_NAME

DATA = prepare_data.EXAMPLE_RECORDS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder: a context of 4,096 tokens, one token a byte."""
    folder = tmp_path_factory.mktemp("model")
    writing_model().config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def command(model: str, out: Path, *more: str) -> list[str]:
    return ["--tokenizer", model, "--out", str(out), "--rows", "30", "--val-rows", "4", *more]


def test_no_prompt_is_longer_than_the_training_takes(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Long sentences are left out, not written and refused by the training."""
    text = tmp_path / "long.txt"
    text.write_text("\n\n".join(sentence(n) + " and so on" * (n % 30) + "." for n in range(60)))
    for recipe in ("started", "mixed"):
        limited = ["--data", str(text), "--recipe", recipe, "--prompt-tokens", "140"]
        assert prepare_data.main(command(model, tmp_path / recipe, *limited)) == 0
        said = capsys.readouterr().out
        assert "prompts dropped: over 140 tokens" in said
        assert "--prompt-tokens 140" in said.splitlines()[-1]  # the train command that fits
        prompts = prompts_of(tmp_path / recipe / "train.parquet")
        prompts += prompts_of(tmp_path / recipe / "val.parquet")
        lengths = [len(render_prompt(read_tokenizer(model), prompt)) for prompt in prompts]
        assert 100 < max(lengths) <= 140
    assert prepare_data.main(command(model, tmp_path / "no", "--prompt-tokens", "9")) == 1
    assert "over --prompt-tokens 9 (the shortest has" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train.parquet", "documents.jsonl"])
def test_data_of_another_origin_are_not_replaced(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if name.endswith("parquet"):
        pd.DataFrame({"prompt": ["mine"]}).to_parquet(out / name)
    else:
        (out / name).write_text('{"document_id": "mine", "text": "mine"}')
    before = (out / name).read_bytes()
    assert prepare_data.main(command(model, out)) == 1
    assert f"holds {name}, which this command did not write" in capsys.readouterr().err
    assert (out / name).read_bytes() == before
    (out / name).unlink()
    assert prepare_data.main(command(model, out)) == 0
    assert prepare_data.main(command(model, out, "--seed", "1")) == 0  # its own it replaces


def test_the_limits_are_those_of_the_training() -> None:
    config = yaml.safe_load((CONFIG_FOLDER / f"{CONFIG_NAME}.yaml").read_text())
    assert config["data"]["max_prompt_length"] == PROMPT_TOKENS
    assert config["data"]["max_response_length"] == RESPONSE_TOKENS


def documents_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "documents.jsonl").read_text().splitlines()]


def test_the_command_writes_what_verl_and_the_teacher_read(model: str, tmp_path: Path) -> None:
    assert prepare_data.main(command(model, tmp_path)) == 0
    train = pd.read_parquet(tmp_path / "train.parquet")
    assert list(train.columns) == SCHEMA.names and len(train) == 30
    assert len(pd.read_parquet(tmp_path / "val.parquet")) == 4
    row = train.iloc[0]
    assert [message["role"] for message in row["prompt"]] == ["user", "assistant"]
    info = row["extra_info"]
    assert (info["index"], info["split"], info["recipe"]) == (0, "train", "started")
    assert (info["document_id"], info["kind"], info["chunk"]) == ("demo_01", "started", None)
    # The document's text stands in one place, whatever the number of rows.
    (document,) = documents_of(tmp_path)
    assert set(document) == {"document_id", "text", "sha256"}
    assert document["text"][:60].encode() not in (tmp_path / "train.parquet").read_bytes()
    assert len(load_questions(tmp_path / "eval.json")) >= 24


def test_files_of_all_recipes_can_be_read_as_one(model: str, tmp_path: Path) -> None:
    for recipe in ("started", "open"):
        assert prepare_data.main(command(model, tmp_path / recipe, "--recipe", recipe)) == 0
        assert pq.read_schema(tmp_path / recipe / "train.parquet").equals(SCHEMA)


def test_a_folder_of_files_longer_than_the_teachers_context(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default the parts fit the model's context with the longest prompt and response."""
    docs, out = tmp_path / "docs", tmp_path / "out"
    docs.mkdir()
    (docs / "short.md").write_text(f"# Short\n\n{prose(10)}")
    (docs / "picture.png").write_bytes(b"\x89PNG")
    pages = [" ".join(sentence(page * 12 + line) for line in range(12)) for page in range(12)]
    write_pdf(docs / "town.pdf", pages, title="The town")
    assert prepare_data.main(command(model, out, "--data", str(docs), "--rows", "150")) == 0
    said = capsys.readouterr().out
    assert "skipped picture.png: not a kind" in said and "12 pages" in said
    assert "longer than the teacher's 3328: " in said
    assert "init_document='short.md'" in said

    documents = documents_of(out)
    parts = [document for document in documents if document.get("parent_id") == "town.pdf"]
    assert [document["document_id"] for document in parts] == [
        f"town.pdf#{n}" for n in range(1, len(parts) + 1)
    ]
    assert len(parts) > 2 and len(documents) == len(parts) + 1
    assert {part["title"] for part in parts} == {"The town"}
    assert " ".join(" ".join(part["text"].split()) for part in parts) == " ".join(pages)

    tiny = writing_model()
    store = DocumentStore.from_file(out / "documents.jsonl")
    teacher = Teacher(tiny, store, partial(render_document, byte_tokenizer()))
    train = pd.read_parquet(out / "train.parquet")
    named = {info["document_id"] for info in train["extra_info"]}
    assert set(train["patient_id"]) == {"short.md", "town.pdf"} and len(named) > 3
    for document_id in store.ids:
        assert len(teacher.document_ids(document_id)) + 512 + 256 <= CONTEXT
    assert json.loads((out / "eval.json").read_text()) == []


@pytest.mark.parametrize("recipe", ["started", "open"])
def test_two_documents_of_one_title_are_never_asked_the_same(
    model: str, tmp_path: Path, recipe: str
) -> None:
    docs, out = tmp_path / "docs", tmp_path / "out"
    for number, name in enumerate(("a", "b")):
        (docs / name).mkdir(parents=True)
        heading = ("# Guide", "#  GUIDE ")[number]
        (docs / name / "guide.md").write_text(
            f"{heading}\n\n## Care\n\nOil the axle each spring.\n\n{prose(8, 50 * number)}"
        )
    arguments = ["--data", str(docs), "--recipe", recipe, "--rows", "200"]
    assert prepare_data.main(command(model, out, *arguments)) == 0
    train = pd.read_parquet(out / "train.parquet")
    teachers: dict[str, set[str]] = {}
    for row in train.itertuples():
        key = json.dumps([dict(message) for message in row.prompt])
        teachers.setdefault(key, set()).add(row.extra_info["document_id"])
        assert row.patient_id in row.prompt[0]["content"]
    assert all(len(found) == 1 for found in teachers.values())
    assert {name for found in teachers.values() for name in found} == {"a/guide.md", "b/guide.md"}
    assert [document["title"] for document in documents_of(out)] == ["Guide", "GUIDE"]


def test_what_can_become_prompts_is_said_and_a_small_share_is_warned_of(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "good.txt").write_text(prose(30))
    code = "x = compute(1)\n" * 90
    (docs / "code.md").write_text(f"# Code\n\n{prose(4)}\n\n```\n{code}```\n")
    assert prepare_data.main(command(model, tmp_path / "out", "--data", str(docs))) == 0
    said = capsys.readouterr().out.splitlines()
    [good] = [line for line in said if line.startswith("read good.txt")]
    assert "100% can become prompts; words of 4." in good
    [bad] = [line for line in said if line.startswith("warning:")]
    assert bad.startswith("warning: code.md: only ") and "% of it can become prompts" in bad
    [code] = [line for line in said if line.startswith("read code.md")]
    assert "% code" in code


def test_a_line_without_a_full_stop_becomes_prompts_that_fit(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the harbour and the museum and the library of the town " * 600)
    arguments = ["--data", str(tmp_path / "a.txt"), "--rows", "20"]
    assert prepare_data.main(command(model, tmp_path / "out", *arguments)) == 0
    train = pd.read_parquet(tmp_path / "out" / "train.parquet")
    assert max(len(row[-1]["content"]) for row in train["prompt"]) <= 1000
    assert len(documents_of(tmp_path / "out")) > 9


def test_one_file_and_a_context_of_ones_own(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(40))
    arguments = ["--data", str(tmp_path / "a.txt"), "--teacher-context", "600"]
    assert prepare_data.main(command(model, tmp_path / "out", *arguments)) == 0
    parts = documents_of(tmp_path / "out")
    assert len(parts) > 4
    assert all(len(render_document(byte_tokenizer(), part["text"])) <= 600 for part in parts)


@pytest.fixture
def website() -> Iterator[str]:
    handler = partial(SimpleHTTPRequestHandler, directory=str(DATA))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_records_from_a_url_and_patients_from_a_list(
    model: str, tmp_path: Path, website: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", f"{website}/clinic.json", "--recipe", "open"]
    arguments += ["--patients", "clinic_02", "--teacher-context", "7000"]
    assert prepare_data.main(command(model, tmp_path, *arguments)) == 0
    assert [document["document_id"] for document in documents_of(tmp_path)] == ["clinic_02"]
    asked = load_questions(tmp_path / "eval.json")
    assert {question.document_id for question in asked} == {"clinic_02"}
    assert prepare_data.main(command(model, tmp_path, "--data", f"{website}/no.json")) == 1
    assert "no.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "absent.json"], "absent.json cannot be read"),
        (["--data", "absent.pdf"], "absent.pdf does not exist"),
        (["--data", "."], "no document in it"),
        (["--data", __file__], "not a kind that is read (.py; known: .txt"),
        (["--data", "absent"], "absent cannot be read"),
        (["--held-out", "0.2"], "belongs to --recipe self_study, not to started"),
        (["--recipe", "self_study"], "self_study needs a server of the base model; fix: "),
        (["--recipe", "self_study"], "cartridge-distill serve --model"),
        (["--recipe", "self_study", "--server", "http://127.0.0.1:9"], "--held-out FRACTION"),
        (["--teacher-context", "0"], "0 tokens are left for a document"),
        (["--teacher-context", "3"], "too small for any text"),
        (["--response-tokens", "4000"], "-416 tokens are left for a document"),
    ],
)
def test_the_command_says_what_is_wrong(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepare_data.main(command(model, tmp_path / "out", *arguments)) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out" / "train.parquet").exists()


def test_a_tokenizer_without_a_model_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert prepare_data.main(command(str(tmp_path / "tokenizer"), tmp_path / "out")) == 0
    assert "whether the documents fit the teacher's context is not checked" in (
        capsys.readouterr().out
    )


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prepare_data.main(["--help"])
    said = capsys.readouterr().out
    for word in ("examples:", "self_study", "--teacher-context", "documents.jsonl", "longhealth"):
        assert word in said
