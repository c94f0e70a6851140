"""One run on two Ray nodes: a worker on each, one publishes, and it trains as one rank does.

Two nodes on one machine, each with its own `ray start`. The second is started without any of the
variables that a worker needs, so what its workers have has come through Ray's runtime_env. What
they have is told by a module that veRL imports in all its processes, and that lies in a folder
which only the driver's PYTHONPATH names.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from cartridge_distill.util.processes import Supervisor, tail
from tests.gateway.rig import TOKEN, Rig, until
from tests.verl.engine_rig import free_port
from tests.verl.world import OVER_HTTP, ROOT, World

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(600)]

STEPS = 2
# Two ranks' bundles of 3 CPUs do not fit on one node, and what veRL's queue takes fits beside them.
CPUS = 5
NEEDED = (
    *("PYTHONPATH", "VERL_PLATFORM", "VERL_USE_EXTERNAL_MODULES", "TOKASAURUS_API_KEY"),
    "VERL_FILE_LOGGER_PATH",
)
PROBE = f"""
import json, os
from pathlib import Path
import ray

if ray.is_initialized():
    told = {{name: os.environ.get(name) for name in (*{NEEDED!r}, "RANK")}}
    told |= {{"node": ray.get_runtime_context().get_node_id(), "raylet": os.getppid()}}
    (Path(__file__).parent / f"{{os.getpid()}}.json").write_text(json.dumps(told))
"""


@dataclass
class Cluster:
    """Two nodes; ``raylets`` are their processes, the one with a worker's variables first."""

    address: str
    raylets: list[psutil.Process]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    # The same for nodes and driver. A head alone would take a token that lies in ~/.ray.
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Not pytest's folder: the path of a Unix socket has room for about a hundred characters.
    folder = Path(tempfile.mkdtemp(prefix="nodes-"))
    address = f"127.0.0.1:{free_port()}"
    ray_start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
    ray_start += ["--node-ip-address=127.0.0.1", f"--num-cpus={CPUS}", "--disable-usage-stats"]
    without = [part for name in NEEDED for part in ("-u", name)]
    with Supervisor() as supervisor:

        def start(name: str, *command: str) -> psutil.Process:
            log = folder / f"{name}.log"
            environment = {"RAY_TMPDIR": str(folder / name)}  # and with it Ray's record of clusters
            child = supervisor.start(command, log, environment)

            def raylet() -> psutil.Process | None:
                assert child.poll() is None, tail(log)
                below = psutil.Process(child.pid).children(recursive=True)
                up = "Ray runtime started" in log.read_text()
                return next((p for p in below if up and p.name() == "raylet"), None)

            found: psutil.Process = until(raylet, f"Ray's {name} node", timeout_s=120)
            return found

        head = ["--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"]
        first = start("first", *ray_start, *head)
        second = start("second", "env", *without, *ray_start, f"--address={address}")
        yield Cluster(address, [first, second])
    shutil.rmtree(folder)


def test_two_nodes_train_as_one_rank(
    world: World,
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOKASAURUS_API_KEY", TOKEN)
    settings = [*OVER_HTTP, f"trainer.total_training_steps={STEPS}", f"trainer.save_freq={STEPS}"]
    settings += ["actor_rollout_ref.actor.cartridge.init=random"]
    with Rig(world.folder / "rig", world.folder / "model") as rig:
        settings += [f"actor_rollout_ref.rollout.custom.tokasaurus_url={rig.url}"]
        status, log = world.run(*settings)
        assert status == 0, log[-4000:]
        alone = world.metrics
        (world.folder / "metrics.jsonl").unlink()

        probes = world.folder / "probes"
        probes.mkdir()
        (probes / "node_probe.py").write_text(PROBE)
        monkeypatch.setenv("PYTHONPATH", str(probes), prepend=os.pathsep)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        variables = "ray_kwargs.ray_init.runtime_env.env_vars"
        status, log = world.run(
            *settings,
            "trainer.nnodes=2",
            "ray_kwargs.ray_init.num_cpus=null",
            f'{variables}.VERL_USE_EXTERNAL_MODULES="verl_patches.plugin,node_probe"',
            f"trainer.default_local_dir={world.folder}/two_nodes",
        )
        assert status == 0, log[-4000:]
        assert rig.metric("uploads_total", "created") == 2 * (STEPS + 1)

    told = [json.loads(file.read_text()) for file in probes.glob("*.json")]
    ranks = {int(process["RANK"]): process for process in told if process["RANK"]}
    assert sorted(ranks) == [0, 1]
    assert ranks[0]["node"] != ranks[1]["node"]
    assert {rank["raylet"] for rank in ranks.values()} == {raylet.pid for raylet in cluster.raylets}
    lacking = cluster.raylets[1].environ()
    assert not set(NEEDED) & lacking.keys()
    elsewhere = [process for process in told if process["raylet"] == cluster.raylets[1].pid]
    for process in elsewhere:
        assert process["PYTHONPATH"].split(":")[:2] == [str(ROOT), str(probes)]
        assert process["VERL_PLATFORM"] == "cpu"
        assert process["VERL_USE_EXTERNAL_MODULES"] == "verl_patches.plugin,node_probe"
        assert process["TOKASAURUS_API_KEY"] == TOKEN
        assert process["VERL_FILE_LOGGER_PATH"] == str(world.folder / "metrics.jsonl")
    assert TOKEN not in log

    assert len(world.metrics) == len(alone) == STEPS
    for step, reference in zip(world.metrics, alone, strict=True):
        for what in ("actor/loss", "actor/grad_norm"):
            assert step[what] == pytest.approx(reference[what], rel=1e-5), what
    saved = world.folder / "two_nodes" / f"global_step_{STEPS}" / "actor" / "cartridge"
    assert (saved / "cartridge.safetensors").is_file()
    assert re.search(rf"step {STEPS}/{STEPS} ", log)
