"""A demo, and a training run that goes on, from the wheel in an empty folder: veRL, Ray, HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from tests.gateway.rig import until
from tests.tiny import save_model, tiny_model
from tests.wheel.conftest import Installed

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(900)]


def test_the_demo(installed: Installed, tmp_path: Path) -> None:
    work = Installed(installed.folder, tmp_path)
    few = ("--steps", 2, "--prompts", 4, "--response", 3, "--test-every", 0, "--threads", 1)
    inherited = {name: os.environ[name] for name in ("HOME",) if name in os.environ}
    done = work.run("demo", *few, timeout=800, **inherited)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout and "trained cartridge" in done.stdout
    out = tmp_path / "runs" / "demo"
    for name in ("report.html", "recipe.json", "cartridge", "evaluation/evaluation.json"):
        assert (out / name).exists()
    assert "cartridge-distill chat runs/demo" in done.stdout.split("next:")[1]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_prepare_serve_and_train_and_go_on(installed: Installed, tmp_path: Path) -> None:
    """Commands as the commands before them print them; the second start trains one step more."""
    work = Installed(installed.folder, tmp_path)
    model_folder, log = tmp_path / "model", tmp_path / "server.log"
    # long enough for a record of the demo, in bytes
    save_model(tiny_model(max_position_embeddings=4096), model_folder)
    made = ("--out", "data", "--rows", 12, "--val-rows", 2)
    assert work.run("prepare", "--tokenizer", model_folder, *made).returncode == 0
    with log.open("w") as sink:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "cartridge_distill.cli.main", "serve"),
                *("--model", str(model_folder), "--port", "0", "--threads", "1"),
            ],
            env=work.environment(PYTHONUNBUFFERED="1"),
            cwd=tmp_path,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    try:
        until(lambda: "gateway on http://" in log.read_text(), "the gateway", 120)
        url = log.read_text().split("gateway on ")[1].split()[0]
        (tmp_path / "run.yaml").write_text(
            f"model: {model_folder}\ndata: data\nserver: {url}\ndevice: cpu\nout: runs/mine\n"
            "tokens: 32\nbatch: 4\nresponse-tokens: 4\nthreads: 1\nsave-every: 1\n"
        )
        for steps in (2, 3):
            done = work.run("train", "--config", "run.yaml", "--steps", steps, timeout=300)
            assert done.returncode == 0, done.stdout + done.stderr
            assert f"step {steps}/{steps}" in done.stdout
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)
    assert "resumed from" in done.stdout and "step 1/3" not in done.stdout
    told = [
        line.split("cartridge-distill ")[1]
        for line in done.stdout.split("next:")[1].split("\n")[1:-1]
    ]
    assert told == ["eval runs/mine", "chat runs/mine", "report runs/mine"]
    assert (tmp_path / "runs/mine/checkpoints/global_step_3/actor/cartridge").is_dir()
    lines = (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert (tmp_path / "runs/mine/train.1.log").is_file()
    asked = work.run("chat", "runs/mine", "--prompt", "Who?", "--max-new-tokens", 4)
    assert asked.returncode == 0, asked.stderr
    reported = work.run("report", "runs/mine")
    assert reported.returncode == 0 and (tmp_path / "runs/mine/report.html").is_file()
