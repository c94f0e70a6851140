"""A Ray of the run's own whose processes are forked from what the launcher imported.

A run starts about a dozen Ray processes, and each would import the same libraries. Where the
launcher has a fork server (:mod:`cartridge_distill.util.fork_server`), it names an executable in
the environment: a Python that forks Ray's own scripts. Ray starts all of its processes with the
driver's ``sys.executable``; so that is set to it, just before ``ray.init``.

On a CPU alone: a process that looked for a GPU can hand none on. And not where a cluster is joined,
whose processes are there already, or start elsewhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from typing import Any

from cartridge_distill.util.forks import EXECUTABLE


def fork_workers(
    ray_init: dict[str, Any], environment: MutableMapping[str, str] = os.environ
) -> dict[str, Any]:
    """``ray_init`` for a Ray whose processes are forked, where there is a fork server.

    Workers of a Ray of the run's own inherit this process's environment. So the variables that are
    to be set in all of them are set here, and Ray has nothing to prepare for each worker.

    Args:
        ray_init: keyword arguments of ``ray.init``; not changed.
        environment: of this process; the workers' variables are added.
    """
    executable = environment.get(EXECUTABLE)
    if executable is None or not os.access(executable, os.X_OK):  # gone, or on a disk without
        return ray_init
    sys.executable = executable
    runtime_env = ray_init.get("runtime_env") or {}
    if runtime_env.keys() - {"env_vars", "working_dir"} or runtime_env.get("working_dir"):
        return ray_init  # Ray has more to prepare
    environment.update(runtime_env.get("env_vars") or {})
    return {**ray_init, "runtime_env": None}
