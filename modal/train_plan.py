"""One attempt at a training run: where it writes, what it calls, whether another one is worth it.

A rented machine can be taken away at any moment; Modal then starts the same function with the same
arguments again. Every attempt at a run works in the run's one folder, with
``trainer.resume_mode=auto``: the training finds its last whole checkpoint there, and goes on with
the optimizer, the schedule and the data where they stood. The steps since that save are trained
again, nothing else.

No Modal in this module: it is tested on real directories.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from cartridge_distill.util.errors import CartridgeFormatError, ConfigError
from cartridge_distill.util.tracker import TRACKER, tracked_step

logger = logging.getLogger(__name__)

# What is decided here; a value from the command line would be overwritten, or break the resume.
_DECIDED = (
    "trainer.total_training_steps",
    "trainer.total_epochs",
    "trainer.default_local_dir",
    "trainer.resume_mode",
)


def saved_step(run: Path) -> int:
    """Steps of the run's last whole checkpoint; 0 without one.

    Raises:
        ConfigError: the file that names it holds something else, or is lost.
    """
    saved = run / "checkpoints"
    try:
        return tracked_step(saved) or 0
    except CartridgeFormatError as error:
        file = saved / TRACKER
        text = file.read_bytes()[:60].decode(errors="replace") if file.is_file() else ""
        raise ConfigError(
            f"the tracker of {run} holds {text!r}, not a step: {error}, or take another --name"
        ) from error


def command(script: Path, steps: int, save_every: int, overrides: Sequence[str]) -> list[str]:
    """The command line of an attempt, the same for each.

    Args:
        script: ``run_cartridge_distill.sh``.
        steps: optimizer steps of the whole run.
        save_every: steps between checkpoints; the user's overrides may say otherwise.
        overrides: the user's Hydra overrides.

    Raises:
        ConfigError: an override of what is decided here.
    """
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key in _DECIDED:
            raise ConfigError(
                f"override {override!r}: {key} is decided here, so that an interrupted run goes "
                "on; say --steps, --save-every or --name instead"
            )
    return [
        *("bash", str(script), f"trainer.save_freq={save_every}", *overrides),
        # veRL stops at whichever comes first; an epoch has at least one step.
        f"trainer.total_epochs={steps}",
        f"trainer.total_training_steps={steps}",
        "trainer.resume_mode=auto",
    ]


def script_environment(
    inherited: Mapping[str, str],
    run: Path,
    url: str,
    data: Path,
    python: str,
    wait_s: int,
    given: Mapping[str, str],
) -> dict[str, str]:
    """The environment of ``run_cartridge_distill.sh``.

    Args:
        inherited: the container's, credentials included.
        run: folder of the run.
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
        "OUT": str(run),
        "DATA": str(data),
        "PYTHON": python,
        "PLATFORM": "cuda",
        "WAIT": str(wait_s),
    }


class Interrupted(RuntimeError):
    """The training ended before its time and had moved on: worth another attempt."""


def run_attempt(
    line: Sequence[str], run: Path, steps: int, environment: Mapping[str, str]
) -> tuple[int, str]:
    """Trains what is left of a run.

    An attempt that failed without saving anything would fail in the same way again, at the price of
    a GPU; one that got on is worth a retry. Being killed from outside never comes back here.

    Args:
        line: from :func:`command`.
        run: folder of the run.
        steps: optimizer steps of the whole run.
        environment: from :func:`script_environment`.

    Returns:
        Exit code and what there is to say.

    Raises:
        Interrupted: it failed after saving at least one new checkpoint.
    """
    before = saved_step(run)
    if before >= steps:
        return 0, f"{run} has its {steps} steps; raise --steps to go on, or take another --name"
    run.mkdir(parents=True, exist_ok=True)
    logger.info("%d of %d steps done; %s", before, steps, run)
    code = subprocess.run(list(line), env=dict(environment), check=False).returncode
    after = saved_step(run)
    if code == 0 and after < steps:
        return (
            1,
            f"the training ended without an error, but at step {after} of {steps}; see its log",
        )
    if code == 0:
        saved = run / "checkpoints" / f"global_step_{after}" / "actor" / "cartridge"
        return 0, f"done; the newest cartridge: {saved}"
    if after > before:
        raise Interrupted(f"the training ended with code {code} after step {after} of {steps}")
    return code, (
        f"the training ended with code {code} and saved nothing new; its log is above. It is not "
        "started again: the next attempt would end in the same way. The same command goes on "
        f"from step {before} once the cause is fixed"
    )
