"""Self-study: prompts over real HTTP from a real model, sifted, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cartridge_distill.data import command as prepare_data
from cartridge_distill.data.decontamination import Guard
from cartridge_distill.data.documents.reading import ReadFile
from cartridge_distill.data.documents.source import Source
from cartridge_distill.data.records import Question
from cartridge_distill.data.self_study.plan import KINDS, OPENINGS, SEED_PROMPTS, Plan
from cartridge_distill.data.self_study.sifting import clean, sift
from cartridge_distill.data.self_study.writing import (
    StudySettings,
    made_with,
    study_rows,
    write_prompts,
)
from cartridge_distill.model.prompts import render_document
from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.server.running import BackgroundServer
from cartridge_distill.server.settings import ServerSettings
from cartridge_distill.util.errors import ConfigError, RolloutError
from cartridge_distill.util.journal import Journal
from tests.data.documents.made import prose
from tests.data.writer import writing_model
from tests.tiny import byte_tokenizer, save_model

ROOT = Path(__file__).parents[2]


TOKENIZER = byte_tokenizer()


def length(text: str) -> int:
    return len(render_document(TOKENIZER, text))


def source(name: str = "town.md", sentences: int = 40, first: int = 0) -> Source:
    text = f"# {name}\n\n{prose(sentences, first)}"
    return Source.of_file(ReadFile(name, name.removesuffix(".md"), text, "markdown"))


def plan_of(
    *sources: Source, chunk_tokens: int = 700, seed: int = 0, openings: bool = False
) -> Plan:
    return Plan(sources or (source(),), chunk_tokens, seed, length, openings)


# --- the plan -------------------------------------------------------------------------------------


def test_a_task_is_a_function_of_documents_seed_and_number() -> None:
    plan, again = plan_of(), plan_of()
    tasks = [plan.task(number) for number in range(60)]
    assert tasks[::-1] == [again.task(number) for number in reversed(range(60))]
    assert tasks != [plan_of(seed=1).task(number) for number in range(60)]
    assert Counter(task.kind for task in tasks) == dict.fromkeys(KINDS, 12)
    assert len({task.seed_prompt for task in tasks}) > 50 and len({t.seed for t in tasks}) == 60
    for task in tasks:
        assert task.seed_prompt.startswith(SEED_PROMPTS[task.kind])
        focus = task.seed_prompt.split('sentence: "')[1].removesuffix('"')
        assert focus in " ".join(task.chunk.text.split())
        assert task.chunk.text == task.chunk.part.document.text[task.chunk.start : task.chunk.end]
    # Every chunk once before any of them twice.
    many = len(plan.chunks)
    assert many > 3
    assert len({task.chunk.span for task in tasks[:many]}) == many


def test_chunks_stay_inside_what_the_teacher_reads() -> None:
    parts = source().split(1500, length)
    plan = plan_of(parts)
    texts = {part.document.document_id: part.document.text for part in parts.parts}
    assert len(texts) > 1 and len(plan.chunks) > len(texts)
    for chunk in plan.chunks:
        assert texts[chunk.part.document.document_id][chunk.start : chunk.end] == chunk.text


def test_with_several_documents_the_model_is_told_which_one_it_reads() -> None:
    plan = plan_of(source("north.md"), source("south.md", first=100))
    for number in range(10):
        task = plan.task(number)
        assert f'The text is from "{task.chunk.source.title}".' in task.seed_prompt


# --- sifting --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "cleaned"),  # None: as it is
    [
        ('  "Who opened the harbour?" ', "Who opened the harbour?"),
        ("Question 1: Who opened it?", "Who opened it?"),
        ("Sure, here is one question:\n\n**Who opened it?**", "Who opened it?"),
        ('"Open" or "closed"', None),
        ("Fill in, for every one of the districts that the whole text names:\nname", None),
        ("What is asked: the year?", None),
    ],
)
def test_cleaning(written: str, cleaned: str | None) -> None:
    assert clean(written) == (written if cleaned is None else cleaned)
    given = "Sum up in a line:\nthe harbour's history"
    assert clean(given, opening="Sum up") == given and clean(given) == "the harbour's history"


def journal_row(plan: Plan, number: int, text: str, finish: str = "stop") -> dict[str, Any]:
    task = plan.task(number)
    return {
        "task": number,
        "document_id": task.chunk.part.document.document_id,
        "chunk": task.chunk.span,
        "kind": task.kind,
        "seed_prompt": task.seed_prompt,
        "opening": task.opening,
        "seed": task.seed,
        "text": text,
        "finish": finish,
    }


def test_bad_generations_are_dropped_and_counted() -> None:
    plan = plan_of()
    asked = "In which year did the library of district 34 open after long debate?"
    options = ("1834", "1835", "1836", "1837", "1838")
    guard = Guard([Question("town.md", asked, options, 0)])
    focus = plan.task(7).seed_prompt.split('sentence: "')[1].removesuffix('"')
    texts = [
        ("Compare the bridge of district 7 with the market of district 6.", None),
        ("", "empty or fewer than 3 words"),
        ("?!? ...", "empty or fewer than 3 words"),
        ("Why so?", "empty or fewer than 3 words"),
        ("a a a " + "aaaa" * 20, "repeats itself"),
        ("the town " * 20, "repeats itself"),
        ("Which harbour opened first and who", "cut off at the token limit"),
        (focus, "copies the seed prompt or the document"),
        (plan.task(8).seed_prompt, "copies the seed prompt or the document"),
        (f"Here: {asked}", "an evaluation question"),
        (
            "In what year did a library in district 34 open, after long debates?",
            "near to an evaluation question",
        ),
        ("compare the bridge of district 7 with the market of district 6", "a duplicate"),
        ("Compare bridge of the district 7 with market 6 of the district", "a near-duplicate"),
        (" ".join(f"word{n}" for n in range(90)), "longer than 400 tokens"),
        ("Write a ballad about the theatre of district 5 and its debate.", None),
    ]
    rows = [
        journal_row(plan, number, text, "length" if reason and "cut off" in reason else "stop")
        for number, (text, reason) in enumerate(texts)
    ]
    found = sift(rows[::-1], plan, guard, TOKENIZER, prompt_tokens=400)
    assert [written.text for written in found.kept] == [t for t, reason in texts if reason is None]
    assert found.dropped == Counter(reason for _, reason in texts if reason)


def test_the_same_prompt_about_two_documents_is_two_prompts() -> None:
    plan = plan_of(source("north.md"), source("south.md", first=100))
    rows = [journal_row(plan, number, "Sum up the whole history here.") for number in range(9)]
    found = sift(rows, plan, Guard([]), TOKENIZER, 400)
    train, val = study_rows(found.kept, plan, 0.5, 0)
    assert len(found.kept) == 2 and found.dropped == {"a duplicate": 7}
    said = sorted(row["prompt"][0]["content"] for row in train + val)
    assert said == [f"Sum up the whole history here. ({name})" for name in ("north", "south")]


def test_a_prompt_that_names_both_documents_is_told_apart() -> None:
    plan = plan_of(source("north.md"), source("south.md", first=100))
    rows = [journal_row(plan, number, "Compare north and south, please.") for number in range(9)]
    train, val = study_rows(sift(rows, plan, Guard([]), TOKENIZER, 400).kept, plan, 0.5, 0)
    said = {row["prompt"][0]["content"]: row["patient_id"] for row in train + val}
    assert set(said.values()) == {"north.md", "south.md"}


def test_held_out_prompts_are_a_fraction_and_apart() -> None:
    plan = plan_of()
    words = [f"Describe thing{n} and matter{n} at length{n}." for n in range(40)]
    rows = [journal_row(plan, number, text) for number, text in enumerate(words)]
    found = sift(rows, plan, Guard([]), TOKENIZER, 400)
    train, val = study_rows(found.kept, plan, 0.25, seed=3)
    assert (len(train), len(val)) == (30, 10)
    texts = {row["prompt"][0]["content"] for row in train}
    assert texts | {row["prompt"][0]["content"] for row in val} == set(words)
    assert study_rows(found.kept, plan, 0.25, seed=3) == (train, val)
    with pytest.raises(ConfigError, match="held-out 1.5"):
        study_rows(found.kept, plan, 1.5, 0)
    with pytest.raises(ConfigError, match="1 good prompts are not enough"):
        study_rows(found.kept[:1], plan, 0.5, 0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prompts": 1}, "too few.*; fix: .* 2 or more"),
        ({"temperature": 0.0}, "; fix: give more than 0"),
        ({"attempts": 0}, "attempts"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        StudySettings(**{"prompts": 8, **settings})


# --- over HTTP ------------------------------------------------------------------------------------


@contextmanager
def serve(folder: Path) -> Iterator[BackgroundServer]:
    settings = ServerSettings(cartridge_dir=folder, model_name="writer")
    with BackgroundServer(writing_model(), byte_tokenizer(), settings) as server:
        yield server


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder and two documents."""
    folder = tmp_path_factory.mktemp("study")
    save_model(writing_model(), folder / "model")
    (folder / "docs").mkdir()
    (folder / "docs" / "north.md").write_text(f"# North\n\n{prose(100)}")
    (folder / "docs" / "south.txt").write_text(prose(20, 100))
    return folder


def command(folder: Path, out: Path, url: str, *more: str) -> list[str]:
    model = str(folder / "model")
    arguments = ["--data", str(folder / "docs"), "--tokenizer", model, "--out", str(out)]
    arguments += ["--recipe", "self_study", "--server", url, "--rows", "14", "--held-out", "0.2"]
    arguments += ["--chunk-tokens", "400", "--teacher-context", "2500", "--concurrency", "4"]
    return [*arguments, *more]


def journal_of(out: Path) -> list[dict[str, Any]]:
    lines = (out / "self_study.jsonl").read_text().split("\n")
    assert lines[-1] == ""
    return [json.loads(line) for line in lines[1:-1]]


@pytest.mark.integration
def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(
    study_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with serve(tmp_path) as server:
        assert prepare_data.main(command(study_folder, whole, server.url)) == 0
    with serve(tmp_path) as server:
        script = [sys.executable, str(ROOT / "training" / "prepare_data.py")]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        child = subprocess.Popen(
            [*script, *command(study_folder, killed, server.url)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        journal = killed / "self_study.jsonl"
        deadline = time.monotonic() + 120
        while not journal.is_file() or journal.read_bytes().count(b"\n") < 5:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)  # a look at the file, until it has some rows
        child.send_signal(signal.SIGKILL)
        child.wait()
    before = journal.read_bytes()
    assert not (killed / "train.parquet").exists()
    with serve(tmp_path) as server:  # a new server draws the same for a request it has not seen
        assert prepare_data.main(command(study_folder, killed, server.url)) == 0
        said = capsys.readouterr().out
    kept = before.count(b"\n") - 1  # less the first line
    assert f"holds {kept} generations; going on from there" in said
    assert journal.read_bytes().startswith(before[: before.rfind(b"\n") + 1])

    rows = journal_of(killed)
    assert sorted(row["task"] for row in rows) == list(range(len(rows))), "repeated or lost"
    assert sorted(map(json.dumps, rows)) == sorted(map(json.dumps, journal_of(whole)))
    for name in ("train", "val"):
        pd.testing.assert_frame_equal(
            pd.read_parquet(whole / f"{name}.parquet"), pd.read_parquet(killed / f"{name}.parquet")
        )

    train, val = (pd.read_parquet(whole / f"{name}.parquet") for name in ("train", "val"))
    assert (len(train), len(val)) == (14, 4)
    documents = {
        row["document_id"]: row
        for row in map(json.loads, (whole / "documents.jsonl").read_text().splitlines())
    }
    assert {"south.txt", "north.md#1", "north.md#2"} <= set(documents)
    assert documents["north.md#2"]["parent_id"] == "north.md"
    assert json.loads((whole / "eval.json").read_text()) == []
    by_seed = {row["seed"]: row for row in rows}
    for row in pd.concat([train, val]).itertuples():
        info = row.extra_info
        assert (info["recipe"], info["kind"] in KINDS) == ("self_study", True)
        origin = by_seed[info["seed"]]
        assert (origin["document_id"], origin["kind"]) == (info["document_id"], info["kind"])
        start, end = map(int, info["chunk"].split(":"))
        assert 0 <= start < end <= len(documents[info["document_id"]]["text"])
        assert [message["role"] for message in row.prompt] == ["user"]
        assert row.prompt[0]["content"].startswith(clean(origin["text"]))
    again = [*command(study_folder, killed, "http://127.0.0.1:9"), "--wait", "0.1"]
    assert prepare_data.main(again) == 1
    assert "fix: start one with" in capsys.readouterr().err


async def write(
    server: BackgroundServer, folder: Path, settings: StudySettings, openings: bool = False
) -> tuple[list[dict[str, Any]], int]:
    """The journal's rows and the number of good prompts."""
    tokenizer, plan = TOKENIZER, plan_of(seed=settings.seed, openings=openings)
    async with TokasaurusClient(server.url) as http:
        about = made_with(plan, tokenizer, settings, await http.models())
        with Journal(folder / "rows.jsonl", about) as journal:
            found = await write_prompts(http, tokenizer, plan, journal, Guard([]), settings)
            return journal.rows, len(found.kept)


async def test_more_prompts_go_on_and_other_settings_are_refused(tmp_path: Path) -> None:
    settings = StudySettings(prompts=6, chunk_tokens=700, concurrency=3)
    with serve(tmp_path) as server:
        few, kept = await write(server, tmp_path, settings)
        assert kept == 6
        more, kept = await write(server, tmp_path, replace(settings, prompts=12, concurrency=5))
        assert kept == 12 and more[: len(few)] == few and len(more) > len(few)
        with pytest.raises(ConfigError, match="temperature: 0.8 there, 0.5 now"):
            await write(server, tmp_path, replace(settings, temperature=0.5))
        with pytest.raises(ConfigError, match="documents and seed prompts: "):
            await write(server, tmp_path, settings, openings=True)


async def test_prompts_begin_with_the_opening_of_their_kind(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        settings = StudySettings(prompts=5, chunk_tokens=700, concurrency=2)
        rows, kept = await write(server, tmp_path, settings, openings=True)
    assert kept == 5
    for row in rows:
        assert row["opening"] in OPENINGS[row["kind"]]
        assert row["text"].startswith(row["opening"])


async def test_attempts_end_and_what_is_too_long_for_the_server_is_refused(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        rows, kept = await write(server, tmp_path, StudySettings(prompts=4, write_tokens=2))
        assert (len(rows), kept) == (16, 0)
        with pytest.raises(RolloutError, match="4096|context|tokens"):
            await write(server, tmp_path / "b", StudySettings(prompts=4, write_tokens=4000))
