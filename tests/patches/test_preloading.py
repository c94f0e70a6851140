"""Which runs have their processes forked, and from what."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cartridge_distill.util.forks import Preloaded
from verl_patches.launching import preloading
from verl_patches.launching.preloading import PRELOADED, SWITCH, preload
from verl_patches.launching.settings import Run

RUN = Run(model="m", data=Path("d"), device="cpu", threads=2)


class Recorded:
    """A supervisor that writes down what it is asked to import."""

    def __init__(self) -> None:
        self.asked: list[tuple[Preloaded, dict[str, str]]] = []

    def preload(self, preloaded: Preloaded, env: dict[str, str]) -> None:
        self.asked.append((preloaded, env))


@pytest.mark.parametrize(
    ("run", "environment", "forks"),
    [
        (RUN, {}, True),
        (replace(RUN, device="cuda"), {}, False),  # CUDA does not live on in a fork
        (replace(RUN, threads=None), {}, False),  # Ray would set it for each worker
        (replace(RUN, overrides=("trainer.nnodes=2",)), {}, False),
        (RUN, {"RAY_ADDRESS": "10.0.0.1:6379"}, False),
        (RUN, {SWITCH: "0"}, False),
    ],
)
def test_a_run_on_this_cpu_alone_is_forked(
    run: Run, environment: dict[str, str], forks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (SWITCH, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    supervisor = Recorded()
    preload(run, supervisor)  # type: ignore[arg-type]
    assert bool(supervisor.asked) is forks
    if forks:
        assert supervisor.asked[0][1]["OMP_NUM_THREADS"] == "2"


def test_what_is_imported_is_there_and_brings_no_ray_and_no_verl() -> None:
    """Ray's library reads its process's identity when it is loaded: it must not be forked."""
    modules = [name for name in PRELOADED.modules if name != "+"]
    asked = f"import sys; from importlib import import_module; list(map(import_module, {modules}))"
    asked += f"; print([name for name in {PRELOADED.never} if name in sys.modules])"
    asked += "; import threading; print(threading.active_count())"
    command = [sys.executable, "-c", asked]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.splitlines()[-2:] == ["[]", "1"]
    assert preloading.PRELOADED.never[0] == "ray"  # whose scripts are forked
