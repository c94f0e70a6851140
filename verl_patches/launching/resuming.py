"""May a run go on in its folder? Asked before anything starts; the engine asks again.

The engine compares with what it has built, a minute after the start. What stands in a configuration
is compared here, within seconds: the cartridge's settings and the optimizer's. The weights, the
documents and the data are the engine's to compare.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cartridge_distill.util import json_text
from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.next_command import shorter
from cartridge_distill.util.same_settings import check_same_settings
from cartridge_distill.util.tracker import ENGINE_FOLDER, step_folder, tracked_step
from verl_patches.launching.configured import configuration
from verl_patches.launching.settings import Run

_PLACE = "trainer.default_local_dir="
_STATE = "training_state.json"
_PLACES = {
    "cartridge": "actor_rollout_ref.actor.cartridge",
    "optim": "actor_rollout_ref.actor.optim",
}


def check_saved(run: Run) -> None:
    """Is it known where an earlier start of the run stood, and was it of the same recipe?

    Raises:
        CartridgeFormatError: it is not known, and checkpoints are there.
        OtherSettings: it was of another; every setting that differs is named.
    """
    if "trainer.resume_mode=resume_path" in run.overrides:
        return  # the engine compares with the checkpoint that was named
    if not run.folder.exists() and not any(o.startswith(_PLACE) for o in run.overrides):
        return  # nothing is there, and the settings need not be composed to know where
    config = configuration(run)
    checkpoints = Path(config.trainer.default_local_dir).expanduser().absolute()
    step = tracked_step(checkpoints) or 0
    file = step_folder(checkpoints, step) / ENGINE_FOLDER / _STATE
    if not step or not file.is_file():
        return
    try:
        saved = dict(json_text.load(file)["recipe"])
    except (json_text.JsonError, KeyError, TypeError, ValueError) as error:
        raise CartridgeFormatError(
            f"{file} is damaged: {error}; fix: name another --out, or delete the checkpoint"
        ) from error
    now = {name: found for name in saved if (found := _value(config, name)) is not _UNKNOWN}
    check_same_settings(
        {name: saved[name] for name in now},
        now,
        f"{shorter(run.folder)} holds a run with other settings, saved up to step {step}; fix: "
        "give the same settings, or another --out for a new run:",
    )


_UNKNOWN = object()


def _value(config: Any, name: str) -> Any:
    """What a saved setting is in this run's configuration; ``_UNKNOWN`` where it is not there."""
    from omegaconf import OmegaConf

    kind, _, key = name.partition(".")
    place = _PLACES.get(kind)
    if place is None:
        return _UNKNOWN
    found = OmegaConf.select(config, f"{place}.{key}", default=_UNKNOWN)
    return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
