"""Whole runs whose rollouts are asked for ahead: real veRL, real Ray, real HTTP, a tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from cartridge_distill.sync.versions import run_of, step_of, version_id
from tests.verl.authors import check_counts
from tests.verl.world import ROWS, STEPS, World
from verl_patches.trainer.history import HISTORY_FILE

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

TOTAL = STEPS + 2  # the last steps are in the data's second pass
CARTRIDGE = "actor_rollout_ref.actor.cartridge"
SETTINGS = [
    f"{CARTRIDGE}.init=random",
    f"trainer.total_training_steps={TOTAL}",
    "trainer.total_epochs=2",
    "trainer.save_freq=1",
]


class Server:
    """What came to the server, in order: of which version each rollout of the student's is."""

    def __init__(self, world: World) -> None:
        self.of_student: list[int] = []
        self.impostor: int | None = None  # a version under whose name another one answers
        self.held: int | None = None  # a version whose rollouts are not answered
        self.free = threading.Event()  # until then
        self._lock = threading.Lock()
        world.proxy.spoil = self.note

    def note(self, _: int, body: dict[str, Any]) -> httpx.Response | None:
        if not body["cartridges"] or body["max_tokens"] == 1:
            return None
        [cartridge] = body["cartridges"]
        with self._lock:
            self.of_student.append(step_of(cartridge["id"]))
        if step_of(cartridge["id"]) == self.impostor:
            cartridge["id"] = version_id(run_of(cartridge["id"]), self.impostor - 1)
        if step_of(cartridge["id"]) == self.held:
            self.free.wait(600)
        return None


def test_a_run_with_rollouts_ahead_until_a_version_answers_under_anothers_name(
    world: World,
) -> None:
    """One step ahead, both authors; the last batch is of the version before the one it names."""
    server = Server(world)
    server.impostor = TOTAL - 2  # the last batch's: one step older than strict
    status, log = world.run(
        *SETTINGS,
        f"{CARTRIDGE}.async_steps=1",
        f"{CARTRIDGE}.on_policy_fraction=[[1,0.25],[4,1.0]]",
    )
    assert status != 0
    assert re.search("OffPolicyError.*server and trainer disagree", log), log[-4000:]
    assert len(world.metrics) == TOTAL - 1  # nothing was trained on it
    by_student = [1, 2, 3, 4]  # of ROWS
    before: dict[str, Any] = {}
    for number, step in enumerate(world.metrics, 1):
        age = min(1, number - 1)
        assert step["training/staleness"] == step["training/staleness_mean"] == age
        assert step[f"training/staleness_samples/{age}"] == by_student[number - 1]
        assert step["actor/logprob_diff/max"] < 1e-3
        assert step["actor/loss"] > 0.01
        check_counts(step, before, by_student[number - 1])
        before = step
    # The first two batches are of the version that was there; each later one of the newest then.
    asked = [
        version
        for count, version in zip([*by_student, ROWS], [0, 0, 1, 2, 3], strict=True)
        for _ in range(count)
    ]
    assert sorted(server.of_student) == asked
    lines = (world.folder / "checkpoints" / HISTORY_FILE).read_text().splitlines()
    assert [step_of(json.loads(line)["version"]) for line in lines] == [0, 0, 1, 2]


def one_of(pattern: str, parent: int) -> psutil.Process:
    """The descendant whose command line begins like this."""
    for process in psutil.Process(parent).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended between two looks
            if re.match(pattern, " ".join(process.cmdline())):
                return process
    raise AssertionError(f"no process {pattern}")


@pytest.mark.long
@pytest.mark.timeout(1200)  # three runs
def test_a_run_that_was_killed_trains_each_batch_once(
    world: World,
) -> None:
    """Two steps ahead, killed while rollouts are in flight, and gone on with."""
    status, log = world.run(*SETTINGS, f"trainer.default_local_dir={world.folder}/strict")
    assert status == 0, log[-4000:]
    strict = world.metrics
    (world.folder / "metrics.jsonl").unlink()

    server = Server(world)
    server.held = 2  # the last batch's: the run cannot end before it is killed
    ahead = [
        *SETTINGS,
        f"{CARTRIDGE}.async_steps=2",
        f"{CARTRIDGE}.sync_keep=1",
        "actor_rollout_ref.rollout.custom.client.read_timeout_s=600",
    ]
    run = world.folder / "checkpoints"

    def kill_once() -> None:
        until_saved(run, 3)
        one_of(r"ray::WorkerDict\b", os.getpid()).send_signal(signal.SIGKILL)
        server.held = None
        server.free.set()

    killer = threading.Thread(target=kill_once)
    killer.start()
    status, log = world.run(*ahead)
    killer.join()
    assert status != 0 and "ProcessDied" in log, log[-4000:]
    saved = int((run / "latest_checkpointed_iteration.txt").read_text())
    assert 3 <= saved < TOTAL
    asked = len(server.of_student)
    status, log = world.run(*ahead)
    assert status == 0, log[-4000:]
    # No batch was lost and none was trained twice: the data are those of the strict run.
    lines = [json.loads(line) for line in (run / HISTORY_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, TOTAL + 1))
    for number, (found, expected) in enumerate(zip(world.metrics, strict, strict=True), 1):
        for what in ("prompt_length/mean", "training/epoch"):
            # The last saved step may have been killed before it was logged.
            assert found.get(what, expected[what] if number == saved else None) == expected[what]
    for number, line in enumerate(lines, 1):
        # The first batches after a start are of the version that it began with.
        start = 0 if number <= saved else saved
        assert step_of(line["version"]) == max(start, number - 3)
        assert line["data"]["training/staleness_mean"] == number - 1 - step_of(line["version"])
    assert len({run_of(line["version"]) for line in lines}) == 2
    assert len(server.of_student) - asked == (TOTAL - saved) * ROWS  # none beyond the last step
    counted = [step["tokens/total_trained"] for step in world.metrics]
    trained = [step["tokens/trained"] for step in world.metrics]
    assert counted == [sum(trained[: n + 1]) for n in range(TOTAL)]
    # The versions that a rollout might still have asked for stayed, and no others.
    last = run_of(lines[-1]["version"])
    there = [folder.name for folder in (world.folder / "cartridges").iterdir()]
    kept = sorted(step_of(version) for version in there if run_of(version) == last)
    assert kept == list(range(max(saved, TOTAL - 2), TOTAL + 1))


def until_saved(run: Path, step: int, timeout_s: float = 300.0) -> None:
    """Waits for a step's checkpoint to count."""
    tracker = run / "latest_checkpointed_iteration.txt"
    deadline = time.monotonic() + timeout_s
    while not tracker.is_file() or int(tracker.read_text()) < step:
        assert time.monotonic() < deadline, f"step {step} was not saved"
        time.sleep(0.02)
