"""What goes to the workers of a Ray cluster that was there before the run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from cartridge_distill.util.forks import EXECUTABLE
from verl_patches.platform.cluster import forward_environment

TOKEN = "a-token-of-the-gateway"
DRIVER = {"PYTHONPATH": "/mine", "VERL_PLATFORM": "cpu", "TOKASAURUS_API_KEY": TOKEN, "HOME": "/me"}
ARGUMENTS: dict[str, Any] = {"runtime_env": {"env_vars": {"VERL_PLATFORM": "cuda"}, "pip": ["a"]}}


def config(address: str | None = None, nnodes: int = 1) -> DictConfig:
    return OmegaConf.create(
        {"ray_kwargs": {"ray_init": {"address": address}}, "trainer": {"nnodes": nnodes}}
    )


def test_a_ray_of_ones_own_inherits_and_is_told_nothing() -> None:
    """Ray writes a runtime_env to its logs; a credential is not put there without need."""
    assert forward_environment(ARGUMENTS, config(), DRIVER) is ARGUMENTS


@pytest.mark.parametrize(
    ("settings", "environment"),
    [
        (config("auto"), DRIVER),
        (config(nnodes=2), DRIVER),
        (config(), DRIVER | {"RAY_ADDRESS": "10.0.0.1:6379"}),
    ],
    ids=["address", "nodes", "RAY_ADDRESS"],
)
def test_a_cluster_gets_what_its_workers_need(
    settings: DictConfig, environment: dict[str, str]
) -> None:
    sent = forward_environment(ARGUMENTS, settings, environment)
    assert sent["runtime_env"] == {
        # what the configuration says goes first; what is nobody's business stays here
        "env_vars": {"PYTHONPATH": "/mine", "VERL_PLATFORM": "cuda", "TOKASAURUS_API_KEY": TOKEN},
        "pip": ["a"],
    }
    assert ARGUMENTS["runtime_env"]["env_vars"] == {"VERL_PLATFORM": "cuda"}


def test_what_a_submitted_job_brings_is_not_sent_twice() -> None:
    job = {"runtime_env": {"env_vars": {"PYTHONPATH": "/theirs", "VERL_PLATFORM": "cuda"}}}
    environment = DRIVER | {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)}
    sent = forward_environment(ARGUMENTS, config("auto"), environment)
    assert sent["runtime_env"]["env_vars"] == {"TOKASAURUS_API_KEY": TOKEN}


def test_workers_of_ones_own_ray_are_forked_where_somebody_has_the_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray starts all of its Pythons with the driver's; the variables are inherited."""
    monkeypatch.setattr(sys, "executable", sys.executable)  # put back afterwards
    executable = tmp_path / "python"
    driver = {**DRIVER, EXECUTABLE: str(executable)}
    asked = {"num_cpus": 8, "runtime_env": {"env_vars": {"NCCL_DEBUG": "WARN"}}}
    assert forward_environment(asked, config(), driver) is asked  # it is gone
    executable.touch(mode=0o600)
    assert forward_environment(asked, config(), driver) is asked  # it cannot be run there
    executable.chmod(0o700)
    assert forward_environment(asked, config("auto"), dict(driver))["runtime_env"] is not None
    assert sys.executable != str(executable)  # a cluster starts its processes itself
    assert forward_environment(asked, config(), driver) == {"num_cpus": 8, "runtime_env": None}
    assert sys.executable == str(executable) and driver["NCCL_DEBUG"] == "WARN"
    # What Ray must prepare for each worker stays, with the variables.
    assert forward_environment(ARGUMENTS, config(), driver) is ARGUMENTS
    assert driver["VERL_PLATFORM"] == "cpu"
