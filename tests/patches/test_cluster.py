"""What goes to the workers of a Ray cluster that was there before the run."""

from __future__ import annotations

import json
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

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
