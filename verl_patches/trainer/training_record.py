"""What a saved cartridge tells of its training: the recipe, the curve, the last step's numbers.

The engine writes the cartridge with what it knows (model, document, step, its own settings). The
rest is the trainer's: how samples were drawn, and the loss over all ranks. It is added to the
cartridge's JSON after each save, before the tracker makes the save count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cartridge_distill.cartridge.checkpoint import record
from cartridge_distill.distill import curve
from verl_patches.actor.engine_state import CARTRIDGE_FOLDER

# Name in the recipe -> where the configuration has it. No paths, names of machines or of runs:
# the recipe is published with the cartridge.
_RECIPE = {
    **{f"data.{name}": f"data.{name}" for name in ("train_batch_size", "seed", "shuffle")},
    **{f"data.{n}": f"data.{n}" for n in ("max_prompt_length", "max_response_length")},
    **{f"rollout.{n}": f"actor_rollout_ref.rollout.{n}" for n in ("n", "temperature")},
    "actor.ppo_mini_batch_size": "actor_rollout_ref.actor.ppo_mini_batch_size",
    "init_document": "actor_rollout_ref.actor.cartridge.init_document",
    "cartridge.max_staleness": "actor_rollout_ref.actor.cartridge.max_staleness",
    "trainer.total_training_steps": "trainer.total_training_steps",
    "trainer.total_epochs": "trainer.total_epochs",
}
# Named where it is above 0 alone: a strict run says nothing of it.
_ASYNC = "cartridge.async_steps", "actor_rollout_ref.actor.cartridge.async_steps"
# Name in the last step's numbers -> veRL's metric; the curve has a few of them.
_NUMBERS = {
    "loss": "actor/loss",
    "grad_norm": "actor/grad_norm",
    "lr": "actor/lr",
    "logprob_diff_max": "actor/logprob_diff/max",
    "teacher_tail_mass": "actor/teacher_tail_mass",
}
_OF_CURVE = ("step", "loss", "grad_norm")


def add_training_record(
    checkpoint: Path, config: DictConfig, history: Sequence[Mapping[str, Any]]
) -> None:
    """Adds recipe, curve and last numbers to the cartridge of a checkpoint (``global_step_7``).

    Args:
        checkpoint: whose files the engine has written.
        config: veRL's whole configuration.
        history: the lines of all steps so far, see ``history``.
    """
    found = {name: OmegaConf.select(config, key) for name, key in _RECIPE.items()}
    recipe = {name: value for name, value in found.items() if value is not None}
    if ahead := OmegaConf.select(config, _ASYNC[1]):
        recipe[_ASYNC[0]] = ahead
    steps = [curve.row(line["step"], **_numbers(line["data"])) for line in history]
    rows = [{name: row[name] for name in _OF_CURVE if name in row} for row in steps]
    metrics = {"curve": curve.thinned(rows), "last_step": steps[-1]} if steps else {}
    record(checkpoint / "actor" / CARTRIDGE_FOLDER, recipe=recipe, metrics=metrics)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(metrics[key]) for name, key in _NUMBERS.items() if key in metrics}
