"""The command that goes on from a finished run: as many steps again, from its cartridge.

A run is one recipe from its first row to its report, so more steps are a run of their own, in a
folder of its own. Optimizer and schedule begin anew; the cartridge does not.
"""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path

from cartridge_distill.cartridge.run_folder import CARTRIDGE_FOLDER
from cartridge_distill.util.next_command import shorter
from cartridge_distill.util.pasting import hydra_value
from verl_patches.launching.command import model_path
from verl_patches.pipeline.settings import INIT, Distillation

_CHECKPOINT = "actor_rollout_ref.actor.cartridge.checkpoint_path"
_OPTIONS = {"prompt_recipe": "--recipe"}
_SAID_ANYHOW = ("device", "dtype")  # their defaults are this machine's
# A rebuild has been done. The name follows from the documents, or was given.
_LEFT_OUT = ("documents", "model", "out", "name", "init", "rebuild", "overrides")


def more_steps(settings: Distillation) -> list[str]:
    """Behind ``cartridge-distill``: the command with the run's own settings."""
    words = ["distill", _shown(settings.documents), "--model", _shown(settings.model)]
    words += ["--out", shorter(next_folder(settings.out))]
    for field in fields(settings):
        value, usual = getattr(settings, field.name), field.default
        if field.name == "threads":
            usual = os.cpu_count() or 2
        if field.name in _LEFT_OUT or value is None:
            continue
        if field.name in _SAID_ANYHOW or value != usual:
            words += [_OPTIONS.get(field.name, f"--{field.name.replace('_', '-')}"), str(value)]
    if settings.name != name_of(settings.documents):
        words += ["--name", settings.name]
    begins = (f"{INIT}=", f"{INIT}_document=", f"{_CHECKPOINT}=")
    words += [said for said in settings.overrides if not said.lstrip("+").startswith(begins)]
    cartridge = hydra_value(settings.out / CARTRIDGE_FOLDER)
    return [*words, f"{INIT}=checkpoint", f"{_CHECKPOINT}={cartridge}"]


def name_of(documents: str) -> str:
    """What a run is called where no ``--name`` says it."""
    name = re.sub(r"[^0-9A-Za-z]+", "-", Path(documents).stem or Path(documents).name).strip("-")
    return name or "mine"


def next_folder(run: Path) -> Path:
    """``RUN-2``, or the first number whose folder is not there."""
    number = 2
    while (found := run.with_name(f"{run.name}-{number}")).exists():
        number += 1
    return found


def _shown(name: str) -> str:
    """A path from the working directory where it lies below it; an id or a URL as it is."""
    path = model_path(name)
    return shorter(Path(path)) if Path(path).is_absolute() else name
