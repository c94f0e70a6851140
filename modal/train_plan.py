"""What one attempt at a training run does: where it begins, where it writes, what it calls.

A rented machine can be taken away at any moment; Modal then starts the same function with the same
arguments again. Each start is an *attempt* with a folder of its own:

    <run>/attempt-001/attempt.json                                   steps done before it
    <run>/attempt-001/checkpoints/global_step_10/actor/cartridge/    10 steps after that
    <run>/attempt-002/...

An attempt goes on from the newest cartridge of all attempts before it and trains the steps that are
left. This is less than a resume: the optimizer and the learning-rate schedule start anew, the steps
since the last save are trained again, and the data begins anew in another order. A full resume
needs the optimizer's state and the data's position, which the training does not save yet (it
refuses ``trainer.resume_mode``). Once it does, ``resume="auto"`` is all that changes here.

No Modal in this module: it is tested on real directories.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cartridge_distill.checkpoint import load_cartridge
from cartridge_distill.errors import CartridgeFormatError, ConfigError

logger = logging.getLogger(__name__)

RUN_NAME = re.compile(r"[A-Za-z0-9]+(?:[-_][A-Za-z0-9]+)*")
_ATTEMPT = re.compile(r"attempt-(\d{3,})")
_STEP = re.compile(r"global_step_(\d+)")
_STARTED = "attempt.json"
# What the plan decides; a value from the command line would be overwritten, or break the resume.
_PLANNED = (
    "trainer.total_training_steps",
    "trainer.total_epochs",
    "trainer.default_local_dir",
    "trainer.resume_mode",
)
_START_FROM = "actor_rollout_ref.actor.cartridge"


@dataclass(frozen=True)
class Checkpoint:
    """A cartridge that was saved whole. ``step``: optimizer steps of the whole run that made it."""

    path: Path
    step: int


@dataclass(frozen=True)
class Attempt:
    """One start of the training.

    Attributes:
        out: folder of its checkpoints and metrics; the script's ``OUT``.
        steps_before: steps of the run that lie behind what it goes on from.
        defaults: Hydra overrides that those of the user may replace.
        overrides: Hydra overrides that come last.
    """

    out: Path
    steps_before: int
    defaults: tuple[str, ...]
    overrides: tuple[str, ...]


def _steps_before(attempt: Path) -> int | None:
    """What the attempt wrote when it started; None if it did not come so far."""
    try:
        steps = json.loads((attempt / _STARTED).read_text())["steps_before"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) else None


def _attempts(run: Path) -> list[tuple[int, Path]]:
    """Numbers and folders of the attempts there are, oldest first."""
    if not run.is_dir():
        return []
    found = [(_ATTEMPT.fullmatch(path.name), path) for path in run.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """The cartridge with the most steps behind it, of all attempts; None without one.

    Only what can be read counts: a machine that vanishes may leave half a file. An unreadable one
    is passed over with a warning, and the one before it is taken.
    """
    candidates: list[tuple[int, int, Path]] = []
    for number, attempt in _attempts(run):
        before = _steps_before(attempt)
        if before is None:
            continue
        for step in (attempt / "checkpoints").glob("global_step_*"):
            match, cartridge = _STEP.fullmatch(step.name), step / "actor" / "cartridge"
            if match and cartridge.is_dir():
                candidates.append((before + int(match[1]), number, cartridge))
    for steps, _, cartridge in sorted(candidates, reverse=True):
        try:
            load_cartridge(cartridge)
        except CartridgeFormatError as error:
            logger.warning("passing over an incomplete checkpoint: %s", error)
            continue
        return Checkpoint(cartridge, steps)
    return None


def plan_attempt(
    run: Path, steps: int, save_every: int, resume: Literal["cartridge", "auto"]
) -> Attempt | None:
    """The next attempt at a run; None when its steps are done. Writes nothing.

    Args:
        run: folder of the run; need not exist.
        steps: optimizer steps of the whole run.
        save_every: steps between saved cartridges.
        resume: see :class:`deploy_settings.TrainSettings`.
    """
    # veRL stops at whichever comes first; an epoch has at least one step.
    bounds = (f"trainer.total_epochs={steps}",)
    saves = (f"trainer.save_freq={save_every}",)
    if resume == "auto":  # one folder, in which veRL finds its own checkpoints
        total = f"trainer.total_training_steps={steps}"
        return Attempt(run, 0, saves, (*bounds, total, "trainer.resume_mode=auto"))

    newest = newest_checkpoint(run)
    done = newest.step if newest else 0
    if done >= steps:
        return None
    numbers = [number for number, _ in _attempts(run)]
    number = max(numbers, default=0) + 1
    overrides = [*bounds, f"trainer.total_training_steps={steps - done}"]
    if newest:
        overrides += [
            f"{_START_FROM}.init=checkpoint",
            f"{_START_FROM}.checkpoint_path={newest.path}",
        ]
    # Another order of the data, or each attempt would train on its first prompts again.
    defaults = (*saves, f"data.seed={number - 1}")
    return Attempt(run / f"attempt-{number:03d}", done, defaults, tuple(overrides))


def begin(attempt: Attempt) -> None:
    """Makes the attempt's folder and writes down where it begins, whole or not at all."""
    attempt.out.mkdir(parents=True, exist_ok=True)
    scratch = attempt.out / f"{_STARTED}.tmp"
    scratch.write_text(json.dumps({"steps_before": attempt.steps_before}))
    os.replace(scratch, attempt.out / _STARTED)


def command(script: Path, attempt: Attempt, overrides: Sequence[str]) -> list[str]:
    """The command line of an attempt.

    Args:
        script: ``run_cartridge_distill.sh``.
        attempt: the plan.
        overrides: the user's Hydra overrides.

    Raises:
        ConfigError: an override that is the plan's.
    """
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key in _PLANNED:
            raise ConfigError(
                f"override {override!r}: {key} is decided here, so that an interrupted run goes "
                "on; say --steps, --save-every or --name instead"
            )
    return ["bash", str(script), *attempt.defaults, *overrides, *attempt.overrides]


def script_environment(
    inherited: Mapping[str, str],
    attempt: Attempt,
    url: str,
    data: Path,
    python: str,
    wait_s: int,
    given: Mapping[str, str],
) -> dict[str, str]:
    """The environment of ``run_cartridge_distill.sh``.

    Args:
        inherited: the container's, credentials included.
        attempt: the plan.
        url: the rollout server.
        data: folder of the data; written by the script when it is not there.
        python: interpreter with the patched veRL.
        wait_s: patience with the server.
        given: further settings of the script; empty ones are left to its defaults.
    """
    environment = {**inherited, **{name: value for name, value in given.items() if value}}
    # A directory shared with the server would take the place of the upload; here there is none.
    environment.pop("SYNC_DIR", None)
    return environment | {
        "TOKASAURUS_URL": url,
        "OUT": str(attempt.out),
        "DATA": str(data),
        "PYTHON": python,
        "PLATFORM": "cuda",
        "WAIT": str(wait_s),
    }


class Interrupted(RuntimeError):
    """The training ended before its time and had moved on: worth another attempt."""


def run_attempt(
    script: Path,
    run: Path,
    steps: int,
    save_every: int,
    resume: Literal["cartridge", "auto"],
    overrides: Sequence[str],
    environment: Callable[[Attempt], Mapping[str, str]],
) -> tuple[int, str]:
    """Trains what is left of a run.

    An attempt that failed without saving anything would fail in the same way again, at the price of
    a GPU; one that got on is worth a retry. Being killed from outside never comes back here.

    Returns:
        Exit code and what there is to say.

    Raises:
        Interrupted: it failed after saving at least one new cartridge.
    """
    attempt = plan_attempt(run, steps, save_every, resume)
    if attempt is None:
        return 0, f"{run} has its {steps} steps; raise --steps to go on, or take another --name"
    line = command(script, attempt, overrides)
    begin(attempt)
    logger.info("%d of %d steps done; %s", attempt.steps_before, steps, attempt.out)
    code = subprocess.run(line, env=dict(environment(attempt)), check=False).returncode
    newest = newest_checkpoint(run) if resume == "cartridge" else None
    if code == 0:
        return 0, f"done; the newest cartridge: {newest.path if newest else attempt.out}"
    if newest and newest.step > attempt.steps_before:
        raise Interrupted(
            f"the training ended with code {code} after step {newest.step} of {steps}"
        )
    return code, (
        f"the training ended with code {code} and saved nothing new; its log is above. It is not "
        "started again: the next attempt would end in the same way. The same command goes on "
        f"from step {attempt.steps_before} once the cause is mended"
    )
