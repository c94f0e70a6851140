"""While a run lasts and when it ends: what is printed, recorded, and kept as its cartridge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, read_meta, save_cartridge
from cartridge_distill.util.best_step import BestStep, note_validation, read_best
from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.fork_client import GONE
from cartridge_distill.util.processes import Supervisor
from tests.patches.failing import failing, saving
from tests.tiny import random_cartridge, tiny_model
from verl_patches import launch
from verl_patches.launching.command import environment, overrides
from verl_patches.launching.following import StepLines, causes
from verl_patches.launching.result import publish
from verl_patches.launching.settings import Run
from verl_patches.trainer.run_folder import keep_newest


def test_one_line_a_step_with_the_time_left_and_the_rest_once() -> None:
    clock = iter([90.0, 100.0, 130.0, 140.0, 152.0])
    started: list[int] = []
    shown = StepLines(started=lambda: started.append(1), now=lambda: next(clock))
    worker = "(TaskRunner pid=1) [cartridge] "
    assert shown("WARNING something") is None
    assert shown(f"{worker}the trainer is up; its workers are being started") is None
    assert shown(f"{worker}a step takes at most 3 GiB") == "   a step takes at most 3 GiB"
    assert shown(f"{worker}a step takes at most 3 GiB") is None  # once
    assert not started
    assert shown(f"{worker}the server has the version to start from") is None
    assert started == [1]
    validation = "KL 0.5000  log-loss 1.000  accuracy 0.500"
    assert shown(f"{worker}validation at step 0/4  {validation}  1.2s") == (
        f"   before step 1: {validation}"
    )
    assert shown(f"{worker}step 1/4  loss 3.0") == "   step 1/4  loss 3.0  90 s left"
    assert shown(f"{worker}validation at step 2/4  {validation}  1.2s") is None
    assert shown(f"{worker}step 2/4  loss 2.0") == (
        f"   step 2/4  loss 2.0  held out: {validation}  20 s left"
    )
    assert shown(f"{worker}step 4/4  loss 1.0") == "   step 4/4  loss 1.0"
    assert started == [1]
    resumed = StepLines(now=lambda: 0.0)
    assert resumed(f"{worker}resumed from run/checkpoints/global_step_3, step 3 of 4") is not None
    assert "before step 4: KL" in str(resumed(f"{worker}validation at step 3/4  {validation}  1s"))
    assert resumed(f"{worker}validation at step 4/4  {validation}  1s") is None
    everything = StepLines(verbose=True)
    assert everything("WARNING something") == "WARNING something"


def test_a_start_that_is_refused_leaves_the_recipe_alone(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine refuses other settings a minute after the start: the report must not show them."""
    run = Run(device="cpu", data=data, out=tmp_path / "run", steps=4)
    saving(monkeypatch, run.folder, 4)
    with Supervisor() as supervisor:
        launch.train(run, supervisor, started=lambda: launch.record(run, ["--lr", "0.02"]))
    before = (run.folder / "recipe.json").read_bytes()
    refusal = "cartridge_distill.util.errors.OtherSettings: cartridge.lr: 0.02 there, 0.5 now"
    failing(run, monkeypatch, f"echo '{refusal}'; exit 1")
    other = replace(run, lr=0.5)
    with Supervisor() as supervisor, pytest.raises(launch.TrainingFailed) as failed:
        launch.train(other, supervisor, started=lambda: launch.record(other, ["--lr", "0.5"]))
    assert not failed.value.again  # and so nobody is told to start it again
    assert (run.folder / "recipe.json").read_bytes() == before


def test_the_best_validated_step_becomes_the_runs_cartridge(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (2, 4, 6):
        folder = checkpoints / f"global_step_{step}"
        meta = CartridgeMeta("someone/tiny", step=step)
        save_cartridge(random_cartridge(tiny_model()), folder / "actor" / "cartridge", meta)
        (folder / "data.pt").touch()
    for step, kl in ((2, 0.9), (3, 0.1), (4, 0.5), (6, 0.7)):  # step 3 was not saved
        note_validation(checkpoints, step, kl)
    note_validation(checkpoints, 6, 0.7)  # a resumed run validates where it goes on
    note_validation(checkpoints, 6, float("nan"))
    best = read_best(checkpoints, 6)
    assert best == BestStep(4, 0.5, 3)
    result = publish(tmp_path / "run", checkpoints, 6)
    assert read_meta(result.cartridge)["step"] == 4 and "lowest of 3" in result.line()
    assert read_meta(result.cartridge)["metrics"]["chosen"]["kl"] == 0.5
    assert "before training" not in result.line()
    for before, told in ((0.9, False), (0.4, True)):  # a training that made it worse says so
        row = {"step": 0, "data": {"val/kl": before}}
        (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        said = publish(tmp_path / "run", checkpoints, 6).line()
        assert (f"before training it was {before:.3f}, which is no higher" in said) == told
    assert read_meta(publish(tmp_path / "run", checkpoints, 6, True).cartridge)["step"] == 6
    result = publish(tmp_path / "run", checkpoints, 6)
    assert read_best(checkpoints, 3) == BestStep(2, 0.9, 1)  # later ones: a timeline that was left
    keep_newest(checkpoints, 6, 1)
    assert sorted(p.name for p in checkpoints.glob("global*")) == ["global_step_4", "global_step_6"]
    (result.cartridge / "notes.txt").write_text("mine")
    with pytest.raises(CartridgeFormatError, match=r"notes.txt.*fix: move it away"):
        publish(tmp_path / "run", checkpoints, 6)
    assert (result.cartridge / "notes.txt").read_text() == "mine"


def test_further_loggers_write_into_the_runs_folder(tmp_path: Path) -> None:
    run = Run(out=tmp_path, log_to="wandb, tensorboard")
    assert "trainer.logger=[console,file,wandb,tensorboard]" in overrides(run)
    found = environment(run, {"HOME": "/"})
    assert found["TENSORBOARD_DIR"] == str(tmp_path / "tensorboard")
    assert found["WANDB_DIR"] == str(tmp_path)
    assert environment(run, {"WANDB_DIR": "/elsewhere"})["WANDB_DIR"] == "/elsewhere"
    assert "WANDB_DIR" not in environment(Run(out=tmp_path), {"HOME": "/"})


def test_a_fork_server_that_died_is_the_cause(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(f"(TaskRunner pid=3) model loaded\n{GONE}\n")
    assert causes(log) == [GONE]
