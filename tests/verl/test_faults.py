"""What a run does when one of its processes is gone: it ends, says so, and loses nothing."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from ray.exceptions import RayActorError

from cartridge_distill.util.errors import CartridgeFormatError, ConfigError, ProcessDied
from tests.training.conftest import child_environment
from verl_patches.rollout import agent_loop
from verl_patches.rollout.agent_loop import CartridgeAgentLoopManager
from verl_patches.trainer import run_folder
from verl_patches.trainer.history import HISTORY_FILE, History
from verl_patches.trainer.watch import ActorWatch

ROOT = Path(__file__).resolve().parents[2]

# Two actors are killed as the kernel would do it. The first death is found by asking, as a trainer
# does that got an error from somewhere; the second by the watch, while the trainer waits for ever.
WATCHED = """
import os, signal, threading
import ray
from cartridge_distill.util.errors import ProcessDied
from verl_patches.trainer import watch as module
from verl_patches.trainer.watch import ActorWatch

@ray.remote(num_cpus=0)
class Sleeper:
    def pid(self):
        return os.getpid()

ray.init(num_cpus=1, include_dashboard=False)
one, two = Sleeper.remote(), Sleeper.remote()
pids = ray.get([one.pid.remote(), two.pid.remote()])
asked = ActorWatch({"agent loop worker 0": one, "storage unit 0": two}, "Start it again.")
asked.check_now()
os.kill(pids[0], signal.SIGKILL)
try:
    asked.check_now()
except ProcessDied as died:
    print("ASKED", died, flush=True)
watch = ActorWatch({"storage unit 0": two}, "Start it again.", grace_s=1.0)
watch.start()
try:
    module.find_actor("rollout proxy", "nobody")
except ProcessDied as died:
    print("FOUND", died, flush=True)
os.kill(pids[1], signal.SIGKILL)
threading.Event().wait()
"""


@pytest.mark.integration
def test_a_dead_actor_is_named_and_ends_a_process_that_waits_for_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    # Ray's own lines may end without a line's end, right before ours.
    asked = next((line for line in done.stdout.splitlines() if "ASKED" in line), "")
    assert "ASKED the agent loop worker 0 died (its worker process has died." in asked, done
    assert asked.endswith("Start it again.")
    assert "FOUND the rollout proxy is gone: Failed to look up actor" in done.stdout
    assert "[cartridge] the storage unit 0 died (its worker process has died." in done.stderr


def test_results_of_a_dead_process_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """veRL's own buffer looks for ever for what an agent loop that is gone will never write."""
    import transfer_queue as tq

    from verl_patches.trainer.replay import StrictReplayBuffer

    watch = ActorWatch({}, "")
    looks = 0

    def running(*_: object) -> dict[str, object]:
        nonlocal looks
        looks += 1
        if looks == 3:
            watch._dead = "the agent loop worker 0 died"
        assert looks < 10
        return {"train": {"a": {"is_prompt": True, "status": "running", "global_steps": 1}}}

    monkeypatch.setattr(tq, "kv_list", running)
    buffer = StrictReplayBuffer("sync", {}, 1, "drop", {}, poll_interval=0.0)  # type: ignore[arg-type]
    buffer.watch = watch
    with pytest.raises(ProcessDied, match="agent loop worker 0"):
        buffer.sample(global_steps=1, partition_id="train", batch_size=1)


# ---------------------------------------------------------------- what is saved with a step


def trained(steps: range, loss: float = 1.0) -> History:
    history = History()
    for step in steps:
        history.add(step, f"run-step-{step - 1:06d}", {"actor/loss": loss * step, "name": "text"})
    return history


def test_steps_of_a_save_that_was_killed_are_not_in_the_history(tmp_path: Path) -> None:
    trained(range(1, 4)).write(tmp_path)  # and the tracker, which comes next, says 2
    resumed = History.read(tmp_path, 2)
    resumed.add(3, "other-step-000002", {"actor/loss": 3.0})
    resumed.write(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / HISTORY_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["version"] for line in lines][1:] == ["run-step-000001", "other-step-000002"]
    assert lines[0]["data"] == {"actor/loss": 1.0}


def test_a_folder_without_a_history_begins_one_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert History.read(tmp_path, 7).lines == []
    (tmp_path / HISTORY_FILE).write_text('{"step": 1, "ver')
    with pytest.raises(CartridgeFormatError, match="history.jsonl is damaged"):
        History.read(tmp_path, 7)


def test_the_log_goes_on_where_the_run_does(tmp_path: Path) -> None:
    """Killed after step 3 was saved and before it was logged; step 4 was logged, never saved."""
    log = tmp_path / "metrics.jsonl"
    logged = [{"step": n, "data": {"actor/loss": float(n), "timing": 0.5}} for n in (1, 2)]
    log.write_text("".join(json.dumps(line) + "\n" for line in logged) + '{"step": 3, "da')
    lines = trained(range(1, 4)).with_logged(log, 3)
    assert lines[:2] == logged
    assert (lines[2]["step"], lines[2]["data"]) == (3, {"actor/loss": 3.0})
    with log.open("a") as sink:
        sink.write('\n{"step": 4, "data": {}}\n')
    assert [line["step"] for line in trained(range(1, 4)).with_logged(log, 3)] == [1, 2, 3]


# ---------------------------------------------------------------- two runs, one folder


def test_one_run_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    first = run_folder.claim(tmp_path)
    with pytest.raises(ConfigError, match="another run trains in"):
        run_folder.claim(tmp_path, wait_s=0.0)
    os.close(first)  # as the kernel does for a process that is killed
    os.close(run_folder.claim(tmp_path, wait_s=0.0))


def test_a_run_that_is_on_its_way_out_is_waited_for(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from verl_patches.trainer.run_folder import claim\n"
        f"claim(Path({str(tmp_path)!r})); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script],
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    other.kill()
    os.close(run_folder.claim(tmp_path))
    other.communicate()


class _Lost(RayActorError):
    def __str__(self) -> str:
        return "The actor is dead because its worker process has died."


class _Refused(RayActorError):
    def __str__(self) -> str:
        return "The actor died because of an error raised in its creation task: DocumentError: no"


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (_Lost, ProcessDied, "agent loop worker died while the run was starting .*worker process"),
        (_Refused, _Refused, "DocumentError: no"),  # in its own words; again would not help
    ],
)
def test_an_agent_loop_that_began_early_and_died_is_named(
    error: type[RayActorError], kind: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies(*_: object) -> None:
        raise error()

    worker = SimpleNamespace(connect=SimpleNamespace(remote=dies))
    manager = object.__new__(CartridgeAgentLoopManager)
    manager.teacher_client = manager.reward_loop_worker_handles = None
    monkeypatch.setattr(CartridgeAgentLoopManager, "_begun", [worker])
    with pytest.raises(kind, match=says):
        asyncio.run(manager._init_agent_loop_workers())
    assert CartridgeAgentLoopManager._begun is None  # the next manager starts its own


def test_a_worker_that_began_early_keeps_its_own_way_to_the_servers() -> None:
    """What came later than the worker is not veRL's client, which goes through the proxy."""
    worker = object.__new__(agent_loop._CartridgeAgentLoopWorker)
    worker.llm_client = own = object()
    worker.connect("teacher", ["reward"])
    assert worker.llm_client is own and worker.teacher_client == "teacher"
    assert worker.reward_loop_worker_handles == ["reward"]
