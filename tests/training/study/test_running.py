"""A whole study on a tiny model: its runs, its table, and what happens when it is stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cartridge_distill.cartridge.checkpoint import load_cartridge
from cartridge_distill.evaluation.names import CONDITIONS
from cartridge_distill.report.reading import read_run
from tests.training.study.made import QUESTIONS, write_grid, write_model, write_texts
from training.study import __main__ as command
from training.study import documents, gate
from training.study.gate import Gate, GateFailed
from training.study.grid import read_grid, registered
from training.study.loop import PlainLoop
from training.study.running import Study, place_of
from training.study.table import tables

ARMS, LAST = ("student", "teacher"), 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and the texts of a study with one document."""
    folder = tmp_path_factory.mktemp("study")
    write_model(folder)
    write_texts(folder / "texts")
    return folder


@pytest.fixture
def texts(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = documents.all_documents(world / "texts")
    monkeypatch.setattr(documents, "all_documents", lambda: known)


def start(world: Path, out: Path, *options: str, **changes: Any) -> int:
    grid = write_grid(out.parent / "grid.yaml", world / "model", **changes)
    return command.main([str(grid), "--out", str(out), "--draft", *options])


def losses(out: Path, arm: str) -> list[float]:
    lines = place_of(out, "harbour", arm, 1).metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, LAST + 1))
    return [json.loads(line)["data"]["actor/loss"] for line in lines]


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    known = documents.all_documents(world / "texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "all_documents", lambda: known)
        assert start(world, out) == 0
    return out


def test_a_study_leaves_whole_runs_and_a_table(whole: Path) -> None:
    for arm in ARMS:
        place = place_of(whole, "harbour", arm, 1)
        run = read_run(place.folder)  # the report's reader
        assert run.evaluation is not None and run.recipe is not None
        assert {row.condition for row in run.evaluation.conditions} == set(CONDITIONS)
        assert run.recipe.name == arm and run.seed == 1
        assert (place.evaluation(2, LAST) / "evaluation.json").is_file()
        kept = load_cartridge(place.folder / "cartridge").state_dict()
        assert kept.keys() == load_cartridge(place.state / "cartridge").state_dict().keys()
        assert losses(whole, arm)[0] > 0.001
    written = [
        json.loads(place_of(whole, "harbour", arm, 1).metrics.read_text().splitlines()[-1])["data"]
        for arm in ARMS
    ]
    # each author wrote all of its arm, and all of it was trained on
    assert [line["tokens/total_generated"] > 0 for line in written] == [True, False]
    assert [line["tokens/total_generated_by_teacher"] > 0 for line in written] == [False, True]
    for line in written:
        by_both = line["tokens/total_generated"] + line["tokens/total_generated_by_teacher"]
        assert line["tokens/total_trained"] == by_both
    table = (whole / "table.md").read_text()
    assert "a draft: its grid was not registered" in table
    for name in (*ARMS, "(no document)", "(full document)", "match, two places", "CPU s"):
        assert name in table, name
    assert "KL, step 2" in table and (whole / "harbour" / "report.html").is_file()


def test_the_table_has_mean_and_spread(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for arm in ARMS:
        runs = out / "harbour" / arm
        shutil.copytree(runs / "seed1", runs / "seed2")
        file = runs / "seed2" / "evaluation" / "evaluation.json"
        content = json.loads(file.read_text())
        for row in content["conditions"]:
            row["metrics"]["kl"]["mean"] += 0.2
        file.write_text(json.dumps(content))
    path = write_grid(tmp_path / "grid.yaml", Path("model"), seeds=[1, 2])
    text = tables(read_grid(path), registered(path, draft=True), out)
    (row,) = [line for line in text.splitlines() if line.startswith("| student")][:1]
    before = json.loads(
        (place_of(out, "harbour", "student", 1).folder / "evaluation/evaluation.json").read_text()
    )
    kl = {row["condition"]: row["metrics"]["kl"]["mean"] for row in before["conditions"]}
    assert f"{kl['trained cartridge'] + 0.1:.3f} ± 0.141" in row


def test_a_stopped_study_goes_on_with_the_numbers_of_one_that_was_not(
    world: Path, whole: Path, texts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in a step, in an evaluation, between two runs: the same command, the same numbers."""
    out, real = tmp_path / "out", PlainLoop.train_step
    steps = 0

    def dies(loop: PlainLoop) -> dict[str, float]:
        nonlocal steps
        steps += 1
        if steps in (4, 6):
            raise KeyboardInterrupt
        return real(loop)

    monkeypatch.setattr(PlainLoop, "train_step", dies)
    assert start(world, out, save_every=3) == 130  # saved at step 2, which was evaluated, and 3
    assert start(world, out, save_every=3) == 130
    assert start(world, out, save_every=3) == 0
    for arm in ARMS:
        assert losses(out, arm) == losses(whole, arm)
        mine, other = (
            load_cartridge(place_of(each, "harbour", arm, 1).folder / "cartridge").state_dict()
            for each in (out, whole)
        )
        for name, tensor in other.items():
            assert torch.equal(mine[name], tensor), name
    done = steps
    assert start(world, out, save_every=3) == 0 and steps == done  # nothing is done again


def test_a_folder_of_another_study_is_refused(
    world: Path, texts: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert start(world, out, "--gate-only") == 0
    assert start(world, out, "--gate-only", steps=5) == 1
    assert "holds another study" in capsys.readouterr().err
    questions = world / "texts" / "harbour.questions.json"  # of the same grid, asked otherwise
    asked = questions.read_text()
    try:
        questions.write_text(asked.replace("How many boats", "What number of boats"))
        assert start(world, out, "--gate-only") == 1
        assert "- documents: {'harbour': " in capsys.readouterr().err
    finally:
        questions.write_text(asked)
    assert start(world, out, "--gate-only") == 0


def test_a_model_that_cannot_answer_is_not_compared_on(
    world: Path, texts: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of random weights answers nothing, with the document or without."""
    out = tmp_path / "out"
    assert start(world, out, gate_points=20.0) == command.REFUSED
    error = capsys.readouterr().err
    assert "harbour: with the full document" in error and "a comparison needs 20" in error
    assert not (out / "harbour").exists()  # nothing was trained or evaluated
    kept = json.loads((out / "gate" / "harbour.json").read_text())
    assert [row["wordings"] for row in kept["answers"]][2] == ["Seven", "7"]


@pytest.mark.parametrize(("full", "passes"), [(5, True), (4, False)])
def test_the_gate_counts_points(full: int, passes: bool) -> None:
    measured = Gate("harbour", 100, 20, full / 20, 1 / 20, {}, [])
    if passes:
        measured.check(20.0)
        assert "passes" in measured.line(20.0)
    else:
        with pytest.raises(GateFailed, match="15 points"):
            measured.check(20.0)
        assert "FAILS" in measured.line(20.0)


def test_the_gate_takes_every_wording(
    world: Path, texts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in that says "7" with the document, and nothing of use without."""

    def texts_of(*arguments: Any) -> list[str]:
        said = "They are 7, in a green box." if arguments[2].name == "full document" else "No."
        return [said] * len(QUESTIONS)

    monkeypatch.setattr(gate, "_texts", texts_of)
    path = write_grid(tmp_path / "grid.yaml", world / "model")
    grid = read_grid(path)
    study = Study(grid, registered(path, draft=True), tmp_path / "out", ["test"])
    (found,) = study.gates(check=False)
    assert (found.full, found.none) == (pytest.approx(2 / 3), 0.0)
    assert found.kinds == {"one place": (0.5, 0.0, 2), "two places": (1.0, 0.0, 1)}
