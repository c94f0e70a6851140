"""Which cartridge an attempt goes on from, and what it calls: on real directories and processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from train_plan import (
    Attempt,
    Interrupted,
    begin,
    command,
    newest_checkpoint,
    plan_attempt,
    run_attempt,
    script_environment,
)
from transformers import PreTrainedModel

from cartridge_distill.checkpoint import WEIGHTS_FILE, CartridgeMeta, save_cartridge
from cartridge_distill.errors import ConfigError
from tests.deploy.recording import PROJECT
from tests.patches.conftest import patched, pristine  # noqa: F401  (fixtures)
from tests.tiny import random_cartridge

START = "actor_rollout_ref.actor.cartridge"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "mine"


@pytest.fixture
def cartridge(llama: PreTrainedModel, tmp_path: Path) -> Path:
    """A cartridge as the engine saves it."""
    folder = tmp_path / "a-cartridge"
    save_cartridge(random_cartridge(llama), folder, CartridgeMeta("tiny"))
    return folder


def saved(attempt: Path, step: int, cartridge: Path) -> Path:
    """Puts the cartridge where the engine puts it after a step of an attempt."""
    target = attempt / "checkpoints" / f"global_step_{step}" / "actor" / "cartridge"
    shutil.copytree(cartridge, target)
    return target


def started(run: Path, number: int, steps_before: int) -> Path:
    attempt = Attempt(run / f"attempt-{number:03d}", steps_before, (), ())
    begin(attempt)
    return attempt.out


# ---- the newest checkpoint


def test_there_is_none_in_a_run_that_has_not_begun(run: Path) -> None:
    assert newest_checkpoint(run) is None
    started(run, 1, 0)
    assert newest_checkpoint(run) is None


def test_steps_are_numbers_and_not_words(run: Path, cartridge: Path) -> None:
    first = started(run, 1, 0)
    saved(first, 90, cartridge)
    hundred = saved(first, 100, cartridge)
    newest = newest_checkpoint(run)
    assert newest is not None and (newest.path, newest.step) == (hundred, 100)


def test_steps_of_earlier_attempts_count(run: Path, cartridge: Path) -> None:
    saved(started(run, 1, 0), 50, cartridge)
    later = saved(started(run, 2, 50), 10, cartridge)
    newest = newest_checkpoint(run)
    assert newest is not None and (newest.path, newest.step) == (later, 60)


def test_of_two_at_the_same_step_the_later_attempt_counts(run: Path, cartridge: Path) -> None:
    saved(started(run, 1, 0), 50, cartridge)
    later = saved(started(run, 2, 0), 50, cartridge)
    newest = newest_checkpoint(run)
    assert newest is not None and newest.path == later


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_half_a_file_is_passed_over_with_a_warning(
    run: Path, cartridge: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = started(run, 1, 0)
    whole = saved(first, 10, cartridge)
    half = saved(first, 20, cartridge) / WEIGHTS_FILE
    if damage == "missing":
        half.unlink()
    else:
        half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    newest = newest_checkpoint(run)
    assert newest is not None and newest.path == whole
    assert "global_step_20" in caplog.text


def test_what_is_no_checkpoint_is_left_alone(run: Path, cartridge: Path) -> None:
    first = started(run, 1, 0)
    saved(first, 10, cartridge)
    (first / "checkpoints" / "global_step_latest").mkdir()
    (first / "checkpoints" / "global_step_30").mkdir()
    (run / "notes").mkdir()
    (run / "attempt-002").mkdir()  # taken away before it had written where it begins
    (run / "attempt-003").mkdir()
    (run / "attempt-003" / "attempt.json").write_text("{")
    saved(run / "attempt-003", 99, cartridge)
    newest = newest_checkpoint(run)
    assert newest is not None and newest.step == 10


# ---- the plan


def test_first_attempt_begins_at_the_beginning(run: Path) -> None:
    attempt = plan_attempt(run, steps=128, save_every=10, resume="cartridge")
    assert attempt is not None
    assert (attempt.out, attempt.steps_before) == (run / "attempt-001", 0)
    assert "trainer.total_training_steps=128" in attempt.overrides
    assert attempt.defaults == ("trainer.save_freq=10", "data.seed=0")
    assert not any("checkpoint_path" in override for override in attempt.overrides)
    assert not run.exists()


def test_next_attempt_goes_on_from_the_last_saved_cartridge(run: Path, cartridge: Path) -> None:
    last = saved(started(run, 1, 0), 50, cartridge)
    (run / "attempt-002").mkdir()
    attempt = plan_attempt(run, steps=128, save_every=10, resume="cartridge")
    assert attempt is not None
    assert (attempt.out, attempt.steps_before) == (run / "attempt-003", 50)
    assert "trainer.total_training_steps=78" in attempt.overrides
    assert f"{START}.init=checkpoint" in attempt.overrides
    assert f"{START}.checkpoint_path={last}" in attempt.overrides
    assert "data.seed=2" in attempt.defaults  # not the first prompts again
    assert not any("resume_mode" in override for override in attempt.overrides)  # refused today


def test_run_with_all_its_steps_is_done(run: Path, cartridge: Path) -> None:
    saved(started(run, 1, 0), 128, cartridge)
    assert plan_attempt(run, 128, 10, "cartridge") is None
    assert plan_attempt(run, 130, 10, "cartridge") is not None


def test_resume_auto_leaves_it_to_verl_in_one_folder(run: Path, cartridge: Path) -> None:
    saved(started(run, 1, 0), 50, cartridge)
    attempt = plan_attempt(run, 128, 10, "auto")
    assert attempt is not None
    assert attempt.out == run
    assert "trainer.resume_mode=auto" in attempt.overrides
    assert "trainer.total_training_steps=128" in attempt.overrides
    assert not any(START in override for override in attempt.overrides)


def test_plan_is_a_configuration_of_the_training(
    patched: Path,  # noqa: F811
    run: Path,
    cartridge: Path,
) -> None:
    last = saved(started(run, 1, 0), 50, cartridge)
    attempt = plan_attempt(run, 128, 10, "cartridge")
    assert attempt is not None
    line = command(PROJECT / "training" / "run_cartridge_distill.sh", attempt, ["data.seed=7"])
    search = f"hydra.searchpath=[file://{patched / 'verl/trainer/config'}]"
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(PROJECT / "training" / "config"), version_base=None):
        config = compose("cartridge_distill", overrides=[*line[2:], search])
    assert config.actor_rollout_ref.actor.cartridge.init == "checkpoint"
    assert config.actor_rollout_ref.actor.cartridge.checkpoint_path == str(last)
    assert config.trainer.total_training_steps == 78
    assert config.trainer.total_epochs >= 78
    assert config.trainer.save_freq == 10
    assert config.data.seed == 7  # the user's own comes after the default


@pytest.mark.parametrize(
    "override", ["trainer.resume_mode=auto", "+trainer.total_epochs=2", "trainer.total_epochs=2"]
)
def test_what_the_plan_decides_cannot_be_overridden(run: Path, override: str) -> None:
    attempt = plan_attempt(run, 128, 10, "cartridge")
    assert attempt is not None
    with pytest.raises(ConfigError, match="is decided here"):
        command(Path("run.sh"), attempt, [override])


def test_environment_of_the_script(run: Path) -> None:
    attempt = Attempt(run / "attempt-001", 0, (), ())
    environment = script_environment(
        {"HF_TOKEN": "t", "SYNC_DIR": "/stale", "TOKASAURUS_API_KEY": "k", "MODEL": "inherited"},
        attempt,
        "https://server",
        Path("/training/data/mine"),
        "/usr/bin/python",
        1200,
        {"MODEL": "", "ROWS": "512"},
    )
    assert "SYNC_DIR" not in environment  # there is no shared directory: the upload is used
    assert environment == {
        "HF_TOKEN": "t",
        "TOKASAURUS_API_KEY": "k",
        "MODEL": "inherited",
        "ROWS": "512",
        "TOKASAURUS_URL": "https://server",
        "OUT": str(run / "attempt-001"),
        "DATA": "/training/data/mine",
        "PYTHON": "/usr/bin/python",
        "PLATFORM": "cuda",
        "WAIT": "1200",
    }


def test_every_variable_is_one_the_script_knows(run: Path) -> None:
    attempt = Attempt(run, 0, (), ())
    ours = script_environment(
        {},
        attempt,
        "u",
        Path("d"),
        "p",
        1,
        dict.fromkeys(("MODEL", "SOURCE", "PATIENTS", "ROWS"), "x"),
    )
    script = PROJECT / "training" / "run_cartridge_distill.sh"
    help_text = subprocess.run(
        ["bash", script, "--help"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    for name in ours:
        assert name in help_text, name


# ---- attempts, with a script in the place of the training


@pytest.fixture
def script(tmp_path: Path, cartridge: Path) -> Path:
    """Writes down how it was called, saves the steps in SAVES, and ends with CODE."""
    path = tmp_path / "run.sh"
    path.write_text(
        f"""
        printf '%s\\n' "$@" > "$OUT/arguments"
        for step in $SAVES; do
          mkdir -p "$OUT/checkpoints/global_step_$step/actor"
          cp -r {cartridge} "$OUT/checkpoints/global_step_$step/actor/cartridge"
        done
        exit $CODE
        """
    )
    return path


def attempt_with(script: Path, run: Path, saves: str, code: int) -> tuple[int, str]:
    def environment(attempt: Attempt) -> dict[str, str]:
        return {**os.environ, "OUT": str(attempt.out), "SAVES": saves, "CODE": str(code)}

    return run_attempt(script, run, 30, 10, "cartridge", ["trainer.logger=[console]"], environment)


def test_interrupted_run_goes_on_and_ends(script: Path, run: Path) -> None:
    with pytest.raises(Interrupted, match="code 137 after step 10 of 30"):
        attempt_with(script, run, "10", 137)
    with pytest.raises(Interrupted, match="code 1 after step 20 of 30"):
        attempt_with(script, run, "10", 1)
    code, message = attempt_with(script, run, "10", 0)
    assert code == 0
    assert str(run / "attempt-003/checkpoints/global_step_10/actor/cartridge") in message
    lines = (run / "attempt-003" / "arguments").read_text().split()
    before = run / "attempt-002/checkpoints/global_step_10/actor/cartridge"
    assert f"{START}.checkpoint_path={before}" in lines
    assert "trainer.total_training_steps=10" in lines
    assert json.loads((run / "attempt-003/attempt.json").read_text()) == {"steps_before": 20}

    code, message = attempt_with(script, run, "10", 1)
    assert code == 0 and "has its 30 steps" in message
    assert not (run / "attempt-004").exists()


def test_attempt_that_got_nowhere_is_not_repeated_at_the_price_of_a_gpu(
    script: Path, run: Path
) -> None:
    code, message = attempt_with(script, run, "", 2)
    assert code == 2
    assert "saved nothing new" in message and "from step 0" in message


def test_killed_attempt_is_found_by_the_next(script: Path, run: Path) -> None:
    """SIGKILL of the process that waits for the training, as when the machine is taken away."""
    script.write_text(script.read_text().replace("exit $CODE", "kill -9 $PPID"))
    waits = f"""
import os, sys
sys.path[:0] = [{str(PROJECT / "modal")!r}, {str(PROJECT)!r}]
from pathlib import Path
from train_plan import run_attempt

def environment(attempt):
    return {{**os.environ, "OUT": str(attempt.out), "SAVES": "10 20"}}

run_attempt(Path({str(script)!r}), Path({str(run)!r}), 30, 10, "cartridge", [], environment)
"""
    assert subprocess.run([sys.executable, "-c", waits], timeout=120).returncode == -9
    attempt = plan_attempt(run, 30, 10, "cartridge")
    assert attempt is not None
    assert (attempt.out.name, attempt.steps_before) == ("attempt-002", 20)
