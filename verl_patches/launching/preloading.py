"""What the processes of a run import alike: once, in a process that they are forked from.

See :mod:`cartridge_distill.util.fork_server`. On a CPU alone: a process that looked for a GPU can
hand none on to those that are forked from it. Ray and veRL are each process's own to import, which
takes half a second where the rest is there.
"""

from __future__ import annotations

import os

from cartridge_distill.util.forks import Preloaded
from cartridge_distill.util.processes import Supervisor
from verl_patches.launching.checks import may_be_elsewhere
from verl_patches.launching.command import environment
from verl_patches.launching.settings import Run

SWITCH = "CARTRIDGE_DISTILL_FORKS"
PRELOADED = Preloaded(
    modules=(
        # for the data and the first checks
        *("cartridge_distill.model.loading", "cartridge_distill.model.reading"),
        *("cartridge_distill.data.command", "cartridge_distill.data.prompt_length"),
        "+",
        *("verl_patches.pipeline.running", "hydra.compose", "cartridge_distill.server.app"),
        # what veRL, Ray and the queue import of others, the largest; what is forgotten here is
        # imported by each
        *("tensordict", "torchdata.stateful_dataloader", "aiohttp", "zmq.asyncio", "msgspec"),
        *("jsonschema", "colorful", "codetiming", "tenacity", "uvloop", "requests", "msgpack"),
        *("google.protobuf.json_format", "pydantic.dataclasses", "datasets", "peft"),
        *("transformers.image_processing_utils", "transformers.models.mistral.modeling_mistral"),
        "cartridge_distill.evaluation.command",
    ),
    never=("ray", "verl"),
)


def preload(run: Run, supervisor: Supervisor) -> None:
    """Begins to import what the run's processes need, where they can be forked.

    Not without a number of threads: Ray would give each worker its own, and OpenMP reads it once.
    And not where :data:`SWITCH` is 0 in the environment.
    """
    if os.environ.get(SWITCH) == "0" or may_be_elsewhere(run):
        return
    if run.device == "cpu" and run.threads is not None:
        supervisor.preload(PRELOADED, environment(run))
