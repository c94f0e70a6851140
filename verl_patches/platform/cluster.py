"""A run on a Ray cluster that is there already: this process's environment reaches its workers.

Workers of a Ray that the run starts itself inherit the driver's environment. Those of a cluster
that was started beforehand, on this machine or others, have the environment of `ray start`; what
they need of the driver's goes with the job, in Ray's ``runtime_env``. Called by cluster.patch,
after veRL has printed its Ray settings and just before ``ray.init``: credentials are in no
configuration and in no log of the run. Ray itself writes a job's ``runtime_env`` to its own logs on
each node.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, MutableMapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cartridge_distill.rollout.http import CREDENTIAL_VARIABLES
from cartridge_distill.util.openmp import SPINNING
from verl_patches.platform.forks import fork_workers

FORWARDED = (
    *("PYTHONPATH", "VERL_PLATFORM", "VERL_USE_EXTERNAL_MODULES"),
    *("VERL_FILE_LOGGER_PATH", "VERL_LOGGING_LEVEL"),
    *("TENSORBOARD_DIR", "WANDB_DIR", "WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"),
    *("OMP_NUM_THREADS", *SPINNING, "TOKENIZERS_PARALLELISM"),
    *("HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN"),
    *CREDENTIAL_VARIABLES,
)
"""Variables that a worker on another node needs as the driver has them, where it has them."""

_SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # how `ray job submit` tells the driver its settings


def forward_environment(
    ray_init: dict[str, Any], config: DictConfig, environment: MutableMapping[str, str] = os.environ
) -> dict[str, Any]:
    """``ray_init`` with this process's variables in its ``runtime_env``, when a cluster is joined.

    What the configuration sets itself stays. What `ray job submit` sends with the job is left out:
    Ray refuses a variable that comes both ways.

    Args:
        ray_init: keyword arguments of ``ray.init``; not changed.
        config: veRL's configuration.
    """
    if not joins_a_cluster(config, environment):
        return fork_workers(ray_init, environment)
    runtime_env = ray_init.get("runtime_env") or {}
    submitted = json.loads(environment.get(_SUBMITTED_JOB) or "{}").get("runtime_env") or {}
    sent = submitted.get("env_vars") or {}
    configured = runtime_env.get("env_vars") or {}
    variables = {
        **{name: environment[name] for name in FORWARDED if name in environment.keys() - sent},
        **{name: value for name, value in configured.items() if sent.get(name) != value},
    }
    return {**ray_init, "runtime_env": {**runtime_env, "env_vars": variables}}


def joins_a_cluster(config: DictConfig, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the run goes to a cluster that somebody started before."""
    address = OmegaConf.select(config, "ray_kwargs.ray_init.address", default=None)
    nodes = OmegaConf.select(config, "trainer.nnodes", default=1)
    return bool(address or environment.get("RAY_ADDRESS") or nodes > 1)
