"""A distillation that is stopped goes on where it stood: same command, same folder."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.conftest import child_environment

pytestmark = [pytest.mark.long, pytest.mark.integration, pytest.mark.timeout(1800)]


def command(record: Path, model: Path) -> list[str]:
    words = ["distill", str(record), "--model", str(model), "--out", "run", "--device", "cpu"]
    words += ["--tokens", "32", "--steps", "5", "--batch", "4", "--response-tokens", "4"]
    words += ["--threads", "1", "--save-every", "1", "--test-every", "0"]
    return [sys.executable, "-m", "cartridge_distill.cli.main", *words]


def test_after_ctrl_c_the_same_command_goes_on(
    patched: Path, record: Path, model_folder: Path, tmp_path: Path
) -> None:
    typed, env = command(record, model_folder), child_environment(patched)
    run, log = tmp_path / "run", tmp_path / "said"
    tracker = run / "checkpoints" / "latest_checkpointed_iteration.txt"
    with log.open("wb") as said:
        child = subprocess.Popen(
            typed, cwd=tmp_path, env=env, stdout=said, stderr=said, start_new_session=True
        )
        until = time.monotonic() + 900
        while not tracker.is_file() and child.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        assert child.wait(120) == 130, log.read_text()
    last = log.read_text().strip().splitlines()[-1]
    step = int(tracker.read_text())
    assert last.startswith(f"stopped: step {step} is saved; the same command goes on"), last
    assert shlex.split(last)[-len(typed) + 3 :] == typed[3:]  # ready to paste
    state = json.loads((run / "distill.json").read_text())
    assert state["done"] == ["data"]
    rows = (run / "data" / "train.parquet").stat().st_mtime_ns

    done = subprocess.run(typed, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== data: run/data is there" in done.stdout
    assert f"resumed from {run}/checkpoints/global_step_{step}" in done.stdout
    assert (run / "data" / "train.parquet").stat().st_mtime_ns == rows
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged == [1, 2, 3, 4, 5]
    assert json.loads((run / "cartridge" / "cartridge.json").read_text())["step"] == 5
    assert (run / "report.html").is_file() and (run / "train.1.log").is_file()
    lines = done.stdout.splitlines()
    (line,) = [line for line in lines[lines.index("next:") + 1 :] if " distill " in line]
    further = [*typed[:4], *shlex.split(line.partition(" distill ")[2])]
    more = subprocess.run(further, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert more.returncode == 0, more.stdout + more.stderr
    made = json.loads((tmp_path / "run-2" / "cartridge" / "cartridge.json").read_text())
    assert made["step"] == 5 and made["recipe"]["cartridge.init"] == "checkpoint"
    assert _first_loss(tmp_path / "run-2") != _first_loss(run)  # it begins where that one ended
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert not [line for line in left.splitlines() if str(run) in line]


def _first_loss(run: Path) -> float:
    first = (run / "metrics.jsonl").read_text().splitlines()[0]
    loss: float = json.loads(first)["data"]["actor/loss"]
    return loss
