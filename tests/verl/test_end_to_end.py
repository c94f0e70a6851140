"""Whole runs: real veRL, real Ray, real HTTP, a tiny random model; faults injected on the wire.

The world's proxy (``world.py``) stands between trainer and embedded server, as a cloud's front door
would, and breaks chosen requests. Each run is a process of its own, started as a user starts it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from cartridge_distill.cartridge.checkpoint import read_meta
from cartridge_distill.util.processes import MARK
from tests.gateway.rig import TOKEN, Rig, until
from tests.verl.world import CARTRIDGE, OVER_HTTP, ROOT, ROWS, STEPS, FaultyProxy, World

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


def test_oracle_and_healthy_steps_until_the_server_fails_for_good(world: World) -> None:
    """A cartridge that is the document's KV: no loss at step 1 through server, proxy and engine.

    On the way the proxy answers 500 once, cuts one body and lets one request hang: each is
    tried again, and nothing is lost. In the step after the last healthy one it answers 500 to
    everything: the run ends, and that step is not in its numbers.
    """
    # rollouts, one probe for each version, three retries
    healthy = ROWS * STEPS + (STEPS + 1) + 3

    def spoil(number: int, _: dict[str, Any]) -> httpx.Response | None:
        if number == 3:
            return httpx.Response(500, text="injected")
        if number == 5:
            return httpx.Response(200, text='{"id": "cut sh')
        if number == 7:
            threading.Event().wait(6)  # longer than the client's patience of 5 s
            return httpx.Response(500, text="too late")
        return httpx.Response(500, text="injected for good") if number > healthy else None

    world.proxy.spoil = spoil
    status, log = world.run(
        f"actor_rollout_ref.actor.cartridge.eval_questions={world.folder}/eval.json",
        "trainer.test_freq=2",
        "trainer.val_before_train=True",
        f"trainer.total_training_steps={STEPS + 2}",
        "trainer.total_epochs=2",
    )
    assert status != 0
    assert re.search("RolloutError.*prompts failed for good.*injected for good", log), log[-4000:]
    assert world.proxy.completions >= healthy + 3  # the first prompt of the fourth step, thrice
    before, *steps = world.metrics
    assert before["val/kl"] < 1e-5 and set(before) == {"val/kl", "val/log_loss", "val/accuracy"}
    assert ["val/kl" in step for step in steps] == [False, True, False]
    assert f"[cartridge] validation at step 2/{STEPS + 2}  KL " in log
    assert abs(steps[0]["actor/loss"]) < 1e-4
    assert len(steps) == STEPS
    for step in steps:
        assert step["actor/logprob_diff/max"] < 1e-3
        assert step["actor/frozen_tokens_changed"] == 0
        assert step["actor/response_tokens"] > 0
    versions = world.loaded()
    assert len(set(versions)) == len(versions) == STEPS + 1  # the initial one and one a step
    assert [int(v[-6:]) for v in versions] == list(range(STEPS + 1))
    assert len(list((world.folder / "cartridges").iterdir())) == 2  # old versions are deleted
    [last] = (world.folder / "checkpoints").glob("global_step_*")
    assert last.name == f"global_step_{STEPS}"
    saved = last / "actor" / "cartridge"
    assert (saved / "cartridge.safetensors").stat().st_size < 1_000_000  # not the base model
    told = read_meta(saved)
    assert told["recipe"]["data.train_batch_size"] == ROWS
    assert told["recipe"]["cartridge.num_tokens"] == CARTRIDGE
    assert str(world.folder) not in json.dumps(told["recipe"])  # it is published: no paths
    losses = [step["actor/loss"] for step in steps]
    assert [row["loss"] for row in told["metrics"]["curve"]] == pytest.approx(losses, rel=1e-5)
    assert told["metrics"]["last_step"]["step"] == STEPS


# Seconds in which the server refuses, then answers 503; "90,30" is what a cloud's cold start takes.
COLD_START = os.environ.get("COLD_START", "7,4")


@pytest.mark.long
def test_a_cold_start_is_waited_for_with_a_line_every_few_seconds(world: World) -> None:
    """Nobody listens, then everything is 503, then it works; the run knows only the URL."""
    refused_s, unavailable_s = map(float, COLD_START.split(","))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = world.folder / "train.log"

    def lines() -> list[str]:
        text = log.read_text(errors="replace") if log.exists() else ""
        return [line for line in text.splitlines() if "waiting for the inference server" in line]

    def come_up() -> None:
        # The sleeps are the cold start itself.
        until(lines, "the run waits for its server", timeout_s=200)
        time.sleep(refused_s)
        late = FaultyProxy(world.proxy.target, port)
        late.cold = True
        time.sleep(unavailable_s)
        late.cold = False

    threading.Thread(target=come_up, daemon=True).start()
    status, text = world.run(
        f"actor_rollout_ref.rollout.custom.tokasaurus_url=http://127.0.0.1:{port}",
        "actor_rollout_ref.rollout.custom.client.startup_timeout_s=600",
        "trainer.total_training_steps=1",
        "trainer.save_freq=1",
    )
    assert status == 0, text[-4000:]
    assert len(world.metrics) == 1
    said = lines()
    assert "ClientConnectorError" in said[0] and "HTTP 503" in said[-1]
    # one at once, then one every five seconds, and not a flood
    expected = 1 + (refused_s + unavailable_s) / 5
    assert expected - 1.5 <= len(said) <= expected + 2, said


def test_a_run_over_http_survives_the_servers_death(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shared directory: the gateway takes the versions. Its server is killed in mid-run."""
    monkeypatch.setenv("TOKASAURUS_API_KEY", TOKEN)
    with Rig(world.folder / "rig", world.folder / "model", "--keep-versions", 2) as rig:

        def kill_once() -> None:
            until(lambda: "step-000001 created" in rig.log, "the second version", timeout_s=200)
            rig.server.kill()

        killer = threading.Thread(target=kill_once)
        killer.start()
        status, log = world.run(
            *OVER_HTTP,
            f"actor_rollout_ref.rollout.custom.tokasaurus_url={rig.url}",
            f"actor_rollout_ref.actor.cartridge.eval_questions={world.folder}/eval.json",
            "trainer.test_freq=2",
        )
        killer.join()
        assert status == 0, log[-4000:]
        validated = ["val/kl" in step for step in world.metrics]
        assert validated == [False, True, True]  # the last one always
        assert abs(world.metrics[0]["actor/loss"]) < 1e-4  # the oracle, over the network
        assert len(world.metrics) == STEPS
        assert all(step["actor/logprob_diff/max"] < 1e-3 for step in world.metrics)
        assert rig.metric("server_restarts_total", "died") == 1
        assert rig.metric("uploads_total", "created") == STEPS + 1
        assert [int(name[-6:]) for name in rig.on_disk()] == [STEPS - 1, STEPS]
    assert TOKEN not in log


@pytest.mark.long
def test_a_version_that_the_gateway_refuses_ends_the_run(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKASAURUS_API_KEY", TOKEN)
    with Rig(world.folder / "rig", world.folder / "model", "--max-cartridge-tokens", 64) as rig:
        status, log = world.run(
            *OVER_HTTP, f"actor_rollout_ref.rollout.custom.tokasaurus_url={rig.url}"
        )
    assert status != 0
    assert f"num_tokens={CARTRIDGE} is over this server's max_cartridge_tokens=64" in log
    assert world.metrics == []


# The sleeps keep processes alive until the signal; nothing waits for their end.
STAY = "time.sleep(600)"
DAEMONS = {
    "Ray": "import ray, time; ray.init(num_cpus=1); print('ALL UP', flush=True); " + STAY,
    "a daemon": (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; {STAY}'], start_new_session=True)\n"
        f"print('ALL UP', flush=True); {STAY}"
    ),
}


@pytest.mark.parametrize(
    ("number", "started"),
    [(signal.SIGINT, "Ray"), (signal.SIGTERM, "a daemon")],
    ids=["Ctrl-C, Ray", "SIGTERM, a daemon"],
)
def test_nothing_outlives_a_supervisor_that_is_interrupted(
    number: int, started: str, tmp_path: Path
) -> None:
    """What left its group too, as Ray's do: whatever carries the supervisor's mark is gone."""
    child = DAEMONS[started]
    script = (
        "import sys, time; from pathlib import Path\n"
        "from cartridge_distill.util.processes import Supervisor\n"
        "with Supervisor() as s:\n"
        f"    s.start([sys.executable, '-c', {child!r}], Path({str(tmp_path / 'log')!r}))\n"
        "    print(s.mark, flush=True)\n"
        f"    {STAY}\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    mark = parent.stdout.readline().strip()
    log = tmp_path / "log"
    until(lambda: log.exists() and "ALL UP" in log.read_text(), "the child and its daemons")
    assert len(marked(mark)) >= 2  # daemons beside the child
    parent.send_signal(number)
    assert parent.wait(timeout=60) != 0
    assert marked(mark) == []


def marked(mark: str) -> list[psutil.Process]:
    """Living processes whose environment has this mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
