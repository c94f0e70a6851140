"""What an attempt at a run calls, and whether another is worth it; on real directories."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from train_plan import Interrupted, command, run_attempt, saved_step, script_environment

from cartridge_distill.util.errors import ConfigError
from tests.deploy.recording import PROJECT
from tests.patches.conftest import patched, pristine  # noqa: F401  (fixtures)
from verl_patches.trainer.run_folder import TRACKER

SCRIPT = PROJECT / "training" / "run_cartridge_distill.sh"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "mine"


def saved(run: Path, text: str) -> None:
    """Writes the tracker as the training does, under the training's own name for it."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / TRACKER).write_text(text)


def test_the_last_whole_checkpoint_is_the_one_the_tracker_names(run: Path) -> None:
    assert saved_step(run) == 0
    (run / "checkpoints" / "global_step_20").mkdir(parents=True)  # a save that was killed
    assert saved_step(run) == 0
    saved(run, "10\n")
    assert saved_step(run) == 10
    saved(run, "ten")
    with pytest.raises(ConfigError, match="holds 'ten', not a step"):
        saved_step(run)


def test_it_is_a_configuration_of_the_training(patched: Path) -> None:  # noqa: F811
    line = command(SCRIPT, 128, 10, ["data.seed=7", "trainer.save_freq=20"])
    search = f"hydra.searchpath=[file://{patched / 'verl/trainer/config'}]"
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(PROJECT / "verl_patches" / "config"), version_base=None):
        config = compose("cartridge_distill", overrides=[*line[2:], search])
    assert config.trainer.resume_mode == "auto"
    assert config.trainer.total_training_steps == 128
    assert config.trainer.total_epochs >= 128
    assert config.trainer.save_freq == 20  # the user's own comes after the default
    assert config.data.seed == 7


@pytest.mark.parametrize(
    "override", ["trainer.resume_mode=disable", "+trainer.total_epochs=2", "trainer.total_epochs=2"]
)
def test_what_is_decided_here_cannot_be_overridden(override: str) -> None:
    with pytest.raises(ConfigError, match="is decided here"):
        command(SCRIPT, 128, 10, [override])


def environment_of(run: Path, given: dict[str, str]) -> dict[str, str]:
    inherited = {"HF_TOKEN": "t", "SYNC_DIR": "/stale", "TOKASAURUS_API_KEY": "k", "MODEL": "mine"}
    data = Path("/training/data/mine")
    return script_environment(
        inherited, run, "https://server", data, "/usr/bin/python", 1200, given
    )


def test_environment_of_the_script(run: Path) -> None:
    assert environment_of(run, {"MODEL": "", "ROWS": "512"}) == {
        # no SYNC_DIR: there is no shared directory, the upload is used
        "HF_TOKEN": "t",
        "TOKASAURUS_API_KEY": "k",
        "MODEL": "mine",
        "ROWS": "512",
        "TOKASAURUS_URL": "https://server",
        "OUT": str(run),
        "DATA": "/training/data/mine",
        "PYTHON": "/usr/bin/python",
        "PLATFORM": "cuda",
        "WAIT": "1200",
    }


def test_every_variable_is_one_the_script_knows(run: Path) -> None:
    ours = environment_of(run, dict.fromkeys(("MODEL", "SOURCE", "PATIENTS", "ROWS"), "x"))
    help_text = subprocess.run(
        ["bash", SCRIPT, "--help"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    for name in ours.keys() - {"HF_TOKEN"}:
        assert name in help_text, name


# ---- attempts, with a script in the place of the training


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Writes down how it was called, saves at step SAVES when that is set, and ends with CODE."""
    path = tmp_path / "run.sh"
    path.write_text(
        f"""
        printf '%s\\n' "$@" >> "$OUT/arguments"
        if [ -n "$SAVES" ]; then
          mkdir -p "$OUT/checkpoints"
          echo "$SAVES" > "$OUT/checkpoints/{TRACKER}"
        fi
        exit $CODE
        """
    )
    return path


def attempt_with(script: Path, run: Path, saves: str, code: int) -> tuple[int, str]:
    environment = {**os.environ, "OUT": str(run), "SAVES": saves, "CODE": str(code)}
    return run_attempt(command(script, 30, 10, []), run, 30, environment)


def test_an_interrupted_run_goes_on_and_ends(script: Path, run: Path) -> None:
    with pytest.raises(Interrupted, match="code 137 after step 10 of 30"):
        attempt_with(script, run, "10", 137)
    with pytest.raises(Interrupted, match="code 1 after step 20 of 30"):
        attempt_with(script, run, "20", 1)
    code, message = attempt_with(script, run, "30", 0)
    assert code == 0
    assert str(run / "checkpoints/global_step_30/actor/cartridge") in message
    called = (run / "arguments").read_text()
    assert called.count("trainer.resume_mode=auto") == 3  # the same call each time
    code, message = attempt_with(script, run, "", 1)
    assert code == 0 and "has its 30 steps" in message
    assert (run / "arguments").read_text() == called


def test_an_attempt_that_ended_early_without_an_error_is_no_success(
    script: Path, run: Path
) -> None:
    code, message = attempt_with(script, run, "20", 0)
    assert code == 1 and "at step 20 of 30" in message
    code, message = attempt_with(script, run, "", 0)
    assert code == 1 and "at step 20 of 30" in message


def test_an_attempt_that_got_nowhere_is_not_repeated_at_the_price_of_a_gpu(
    script: Path, run: Path
) -> None:
    with pytest.raises(Interrupted):
        attempt_with(script, run, "10", 1)
    code, message = attempt_with(script, run, "", 2)
    assert code == 2
    assert "saved nothing new" in message and "from step 10" in message


def test_a_killed_attempt_leaves_a_run_that_goes_on(script: Path, run: Path) -> None:
    """SIGKILL of the process that waits for the training, as when the machine is taken away."""
    script.write_text(script.read_text().replace("exit $CODE", "kill -9 $PPID"))
    waits = f"""
import os, sys
sys.path[:0] = [{str(PROJECT / "modal")!r}, {str(PROJECT)!r}]
from pathlib import Path
from train_plan import command, run_attempt

run = Path({str(run)!r})
environment = {{**os.environ, "OUT": str(run), "SAVES": "20"}}
run_attempt(command(Path({str(script)!r}), 30, 10, []), run, 30, environment)
"""
    assert subprocess.run([sys.executable, "-c", waits], timeout=120).returncode == -9
    assert saved_step(run) == 20
