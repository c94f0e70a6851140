"""The command: its files, its table, and that a killed one goes on without repeating anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cartridge_distill.cartridge.checkpoint import convert, read_cartridge, read_meta
from cartridge_distill.data.general_rows import off_context_prompts
from cartridge_distill.data.records import Question, save_questions
from cartridge_distill.evaluation.answers import READINGS
from cartridge_distill.evaluation.command import main
from cartridge_distill.evaluation.journal import JOURNAL_FILE, Journal
from cartridge_distill.evaluation.measure_rows import OffContext, OwnText
from cartridge_distill.evaluation.names import CONDITIONS, FULL_DOCUMENT, TRAINED
from cartridge_distill.evaluation.results import QuestionResult
from tests.evaluation.made import OPTIONS, QUESTIONS, TEXTS, write_data, write_oracle

MANY = [
    Question("two", f"What has Ben, number {n}?", OPTIONS, n % 5, "Ben has" if n % 2 else None)
    for n in range(20)
]


@pytest.fixture
def arguments(
    model_folder: Path,
    packed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> list[str]:
    """The options of an evaluation of the oracle: a cartridge that is a document's KV."""
    data = write_data(tmp_path / "data", QUESTIONS[1:])
    prompts = [
        [{"role": "user", "content": "Tell me about Ben."}],
        [{"role": "user", "content": "The boat?"}, {"role": "assistant", "content": "The boat is"}],
    ]
    frame = pd.DataFrame({"prompt": prompts, "extra_info": [{"document_id": "two"}] * 2})
    frame.to_parquet(data / "val.parquet")
    cartridge = write_oracle(packed, tokenizer, "two", tmp_path / "cartridge")
    found = ["--model", str(model_folder), "--data", str(data), "--cartridge", str(cartridge)]
    # As large as document two: it does not fit the first tokens of document one.
    conditions = [name for name in CONDITIONS if name != "untrained cartridge"]
    return [*found, "--out", str(tmp_path / "out"), "--conditions", *conditions]


@pytest.mark.parametrize("reading", ["named", "closest"])
def test_the_files_and_the_table(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], reading: str
) -> None:
    wanted = ["--prompts", "--generate", "--max-new-tokens", "6", "--samples", "1", "--seed", "3"]
    assert main([*arguments, *wanted, "--read-answers", reading]) == 0
    shown = capsys.readouterr()
    assert "evaluating: 100 %" in shown.err and "Loading weights" not in shown.err
    table = shown.out.splitlines()
    assert len({len(line) for line in table[:6]}) == 1 and len(table[0].split("|")) == 9
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *("evaluation.json", "evaluation.parquet", "evaluation_prompts.parquet"),
        "document_kl.json",
    }
    rows = pd.read_parquet(out / "evaluation.parquet")
    assert list(rows.columns) == QuestionResult.SCHEMA.names
    assert len(rows) == 2 * 4 and set(rows["seed"]) == {3}
    choices = [READINGS[reading](text, OPTIONS) for text in rows["generated_text"]]
    assert [None if pd.isna(c) else int(c) for c in rows["generated_choice"]] == choices
    summary = json.loads((out / "evaluation.json").read_text())
    assert summary["answers_read_by"] == reading
    by_name = {entry["condition"]: entry for entry in summary["conditions"]}
    assert list(by_name) == [name for name in CONDITIONS if name != "untrained cartridge"]
    # All of the document's tokens: the oracle.
    for metric in ("kl", "prompt_kl"):
        trained, none = (by_name[name]["metrics"][metric] for name in (TRAINED, "no document"))
        assert trained["mean"] < 1e-5 < none["low"] <= none["mean"] <= none["high"]
        assert trained["n"] == 2
    for metric in ("log_loss", "accuracy"):
        means = [by_name[n]["metrics"][metric]["mean"] for n in (TRAINED, FULL_DOCUMENT)]
        assert means[0] == pytest.approx(means[1], abs=1e-4)
    assert by_name["best chunk"]["kv_tokens"] <= by_name[TRAINED]["kv_tokens"]
    of_trained = rows[rows["condition"] == TRAINED]
    kl = of_trained["kl_sum"].sum() / of_trained["kl_tokens"].sum()
    assert by_name[TRAINED]["metrics"]["kl"]["mean"] == pytest.approx(kl)
    [sample] = summary["samples"]
    assert sample["answers"][TRAINED] == sample["answers"][FULL_DOCUMENT] and sample["started"]
    assert {"model", "model_revision", "cartridge", "seed", "confidence", "versions"} < set(summary)


def test_measures_have_files_tables_and_positions(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = [*arguments, "--samples", "0"]
    measures = ["--measures", "own_text", "off_context", "--measure-tokens", "9"]
    assert main([*plain, *measures]) == 0
    shown = capsys.readouterr()
    assert "own texts: 24 of up to 9 tokens, under 4 conditions" in shown.err
    assert "own texts: 100 %" in shown.err and "unrelated prompts: 100 %" in shown.err
    assert "KL on own text" in shown.out and "| KL, 5-16 |" in " ".join(shown.out.split())
    out = tmp_path / "out"
    texts = pd.read_parquet(out / "evaluation_own_texts.parquet")
    assert list(texts.columns) == OwnText.SCHEMA.names and len(texts) == 24
    assert set(texts["temperature"]) == {0.0, 0.7}  # the oracle tells of no rollouts
    unrelated = pd.read_parquet(out / "evaluation_off_context.parquet")
    assert list(unrelated.columns) == OffContext.SCHEMA.names
    assert len(unrelated) == 4 * len(off_context_prompts())
    summary = json.loads((out / "evaluation.json").read_text())
    assert summary["measures"] == {
        "groups": ["off_context", "own_text"],
        "temperature": 0.7,
        "tokens": 9,
    }
    by_name = {entry["condition"]: entry for entry in summary["conditions"]}
    for name in (TRAINED, FULL_DOCUMENT):  # the oracle copies the teacher
        metrics = by_name[name]["metrics"]
        assert metrics["student_kl"]["mean"] < 1e-5 and metrics["topk_overlap"]["mean"] > 0.999
    none = by_name["no document"]["metrics"]
    assert none["student_kl"]["mean"] > 1e-3 and none["off_context_kl"]["mean"] < 1e-5
    assert none["student_kl_17_64"] is None and none["off_context_kl"]["n"] > 100
    for entry in summary["conditions"]:
        assert [(p["first"], p["last"]) for p in entry["positions"]][-1] == (9, 12)
        assert len(entry["texts"]) == 4
    assert main(plain) == 0  # nothing of them is left in the files of an evaluation without
    assert not (out / "evaluation_own_texts.parquet").exists()
    again = json.loads((out / "evaluation.json").read_text())
    assert "measures" not in again and "student_kl" not in again["conditions"][0]["metrics"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--measures", "own_texts"], "own_text"),
        (["--measure-tokens", "257"], "256 or fewer"),
        (["--measure-temperature", "0"], "more than 0"),
    ],
)
def test_measures_that_make_no_sense_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str], options: list[str], problem: str
) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, *options])
    assert problem in capsys.readouterr().err


def test_a_cartridge_holds_its_own_table(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cartridge"
    keys, _ = read_cartridge(folder).snapshot.layers()
    assert main([*arguments, "--samples", "0"]) == 0
    assert read_meta(folder)["metrics"] == {}  # nothing is written unasked
    assert main([*arguments, "--samples", "0", "--record"]) == 0
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    results = read_meta(folder)["metrics"]["results"]
    for row, entry in zip(results, summary["conditions"], strict=True):
        assert row["condition"] == entry["condition"]
        assert row["kl"] == entry["metrics"]["kl"]["mean"]
    kept, _ = read_cartridge(folder).snapshot.layers()
    assert all(torch.equal(*pair) for pair in zip(kept, keys, strict=True))
    convert(folder, tmp_path / "c.pt", "hazyresearch")
    capsys.readouterr()
    assert main([*arguments, "--cartridge", str(tmp_path / "c.pt"), "--record"]) == 1
    assert "--to native" in capsys.readouterr().err


def test_without_questions_the_held_out_prompts_are_taken(
    arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "data" / "eval.json").unlink()
    assert main(arguments) == 0
    [*_, full] = json.loads((tmp_path / "out" / "evaluation.json").read_text())["conditions"]
    assert full["metrics"]["prompt_kl"]["n"] == 2 and full["metrics"]["kl"] is None
    assert not (tmp_path / "out" / "evaluation.parquet").exists()


def test_what_cannot_be_evaluated_is_said(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "documents.jsonl").write_text(
        json.dumps({"document_id": "one", "text": TEXTS["one"]})
    )
    assert main(arguments) == 1
    assert "'two', which is not among" in capsys.readouterr().err
    for wrong in (["--dtype", "fp7"], ["--limit", "0"], ["--served", "x"]):
        with pytest.raises(SystemExit):
            main([*arguments, *wrong])


def test_the_untrained_cartridge_is_of_the_first_document_or_named(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = [*arguments[: arguments.index("--conditions")], "--conditions", "untrained cartridge"]
    assert main(alone) == 1
    assert "document 'one' has" in (said := capsys.readouterr().err) and "--untrained" in said
    named = [*alone, "trained cartridge", "--untrained", str(tmp_path / "cartridge")]
    assert main(named) == 0
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    [pair] = summary["differences"]
    assert (pair["condition"], pair["baseline"]) == (TRAINED, "untrained cartridge")
    assert set(pair["metrics"]["kl"].values()) == {0.0, 2}  # they are the same


@pytest.mark.parametrize("name", ["evaluation.json", "evaluation.parquet"])
def test_results_of_another_origin_are_not_replaced(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"mine": 1}')
    assert main(arguments) == 1
    assert f"holds {name}, which no evaluation wrote" in capsys.readouterr().err
    assert (tmp_path / "out" / name).read_text() == '{"mine": 1}'


@pytest.mark.integration
def test_longhealths_script_generates(arguments: list[str], tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "training" / "eval_longhealth.py"
    command = [sys.executable, str(script), *arguments, "--max-new-tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "generated accuracy" in done.stdout
    assert pd.read_parquet(tmp_path / "out" / "evaluation.parquet")["generated_text"].notna().all()
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert summary["answers_read_by"] == "closest"  # LongHealth's protocol


# The child writes so many times and then is gone, as by the kernel's out-of-memory killer.
_KILLED_IN_MIDDLE = """
import os, signal, sys
from cartridge_distill.evaluation.command import main
from cartridge_distill.evaluation.journal import Journal
add, writes = Journal.add, 0
def add_and_die(self, rows):
    global writes
    add(self, rows)
    writes += 1
    if writes == 6:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.add = add_and_die
main(sys.argv[1:])
"""


@pytest.mark.integration
def test_a_killed_evaluation_repeats_and_loses_nothing(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_questions(tmp_path / "data" / "eval.json", MANY)
    out = arguments.index("--out") + 1
    whole = [*arguments, "--prompts"]
    whole[out] = str(tmp_path / "whole")
    assert main(whole) == 0
    killed = [*arguments, "--prompts"]
    command = [sys.executable, "-c", _KILLED_IN_MIDDLE, *killed]
    # tests/ has the packages' root on its path; the child gets it from the environment.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    journal = tmp_path / "out" / JOURNAL_FILE
    lines = journal.read_bytes().splitlines(keepends=True)
    done = [json.loads(line) for line in lines[1:]]
    assert len(done) == 4 * 8 + 2 * 8 and not (tmp_path / "out" / "evaluation.json").exists()
    journal.write_bytes(b"".join(lines) + lines[-1][:40])  # and a row that was cut short
    capsys.readouterr()
    added: list[str] = []
    add = Journal.add
    monkeypatch.setattr(
        Journal,
        "add",
        lambda self, rows: (added.extend(r.condition for r in rows), add(self, rows)),
    )
    assert main(killed) == 0
    assert f"{len(done)} rows are in" in capsys.readouterr().err
    assert len(added) == 4 * (len(MANY) + 2) - len(done)
    assert not journal.exists()
    for name in ("evaluation.parquet", "evaluation_prompts.parquet"):
        one, other = (pd.read_parquet(tmp_path / folder / name) for folder in ("whole", "out"))
        index = "question_index" if "question_index" in one else "prompt_index"
        key = ["condition", index]
        assert not one.duplicated(key).any() and len(one) == len(other)
        one, other = (frame.sort_values(key, ignore_index=True) for frame in (one, other))
        pd.testing.assert_frame_equal(one, other)


def test_a_journal_of_other_settings_is_set_aside(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    old = json.dumps({"seed": 9, "cartridge": "another"}) + "\n"
    (out / JOURNAL_FILE).write_text(old)
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "other settings: " in said and "cartridge" in said and "set aside" in said
    [aside] = out.glob("evaluation.journal.*.jsonl")
    assert aside.read_text() == old and (out / "evaluation.json").is_file()
    (out / JOURNAL_FILE).write_text("no journal\n")
    assert main(arguments) == 1
    assert "is not a journal" in capsys.readouterr().err
