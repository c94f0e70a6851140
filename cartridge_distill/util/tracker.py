"""Which step of a run's folder counts: the tracker, and the checkpoints beside it.

``latest_checkpointed_iteration.txt`` holds the number of the last step that was saved whole. It is
written last. A save that was killed before that leaves a folder with the mark ``.saving`` in it,
or without one of its two parts; every other ``global_step_N`` is whole. So whole checkpoints
without a tracker mean that the tracker is lost, and not that the run is new. The history of the
steps (``history.jsonl``) is written before the tracker and ends with the same step: a tracker in
which a digit was changed names another checkpoint, and the history tells.

The trainer, the launcher and a rented machine's plan read it here, and none of them deletes
anything on its word.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.sealed import unsealed

TRACKER = "latest_checkpointed_iteration.txt"
HISTORY_FILE = "history.jsonl"
DATA_FILE = "data.pt"
ENGINE_FOLDER = "actor"
SAVING = ".saving"
_STEP = re.compile(r"global_step_(\d{1,18})")


def step_folder(run: Path, step: int) -> Path:
    """Where a step's checkpoint is, or would be."""
    return run / f"global_step_{step}"


def step_number(folder: Path) -> int | None:
    """Of a folder that is called ``global_step_<number>``; None for another."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def tracked_step(run: Path) -> int | None:
    """What the tracker says; None where a run is new and there is nothing to count.

    Raises:
        CartridgeFormatError: it is damaged, or whole checkpoints are there and it is not, or it
            does not name the one that was saved last.
    """
    tracker = run / TRACKER
    try:
        text = tracker.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        if saved := saved_steps(run):
            raise CartridgeFormatError(
                f"{tracker} is not there, and {run} holds whole checkpoints up to step {saved[-1]}:"
                f" a run from the start would be mixed with them; {how_to_go_on(run)}"
            ) from None
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CartridgeFormatError(
            f"{tracker} cannot be read: {error}; {how_to_go_on(run)}"
        ) from error
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise CartridgeFormatError(
            f"{tracker} says {text!r:.60}, not the number of a step; {how_to_go_on(run)}"
        )
    last = _last_saved(run)
    if last is not None and last != int(text):
        raise CartridgeFormatError(
            f"{tracker} says {text}, and {run / HISTORY_FILE} that step {last} was saved last, "
            f"whose checkpoint is whole; {how_to_go_on(run)}"
        )
    return int(text)


def _last_saved(run: Path) -> int | None:
    """The last step of the history, if its checkpoint is whole; else the history tells nothing."""
    try:
        *_, line = (run / HISTORY_FILE).read_bytes().splitlines()
        step = unsealed(json.loads(line))["step"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None  # none is kept, or it is damaged, which its reader says
    return step if type(step) is int and is_whole(step_folder(run, step)) else None


def how_to_go_on(run: Path) -> str:
    """What to do about a tracker that is lost, damaged or wrong."""
    saved = saved_steps(run)
    if not saved:
        return (
            "fix: delete the file to begin anew, for no whole checkpoint is there, or take another "
            "trainer.default_local_dir"
        )
    last = _last_saved(run)
    newest = saved[-1] if last is None else last
    return (
        f"fix: to go on from the newest one: echo {newest} > {run / TRACKER}. From another: set "
        "trainer.resume_mode=resume_path and trainer.resume_from_path to one of "
        f"{[str(step_folder(run, step)) for step in saved]}. For a new run, take another "
        "trainer.default_local_dir. Nothing was deleted"
    )


def saved_steps(run: Path) -> list[int]:
    """Steps whose folders are whole, in order."""
    if not run.is_dir():
        return []
    found = {step: folder for folder in run.iterdir() if (step := step_number(folder)) is not None}
    return sorted(step for step, folder in found.items() if is_whole(folder))


def has_both_parts(folder: Path) -> bool:
    """Whether data position and engine state are there; whole or not is :func:`is_whole`."""
    return (folder / DATA_FILE).is_file() and (folder / ENGINE_FOLDER).is_dir()


def is_whole(folder: Path) -> bool:
    """Both parts are there, and no save was killed before the tracker named the folder."""
    if not has_both_parts(folder):
        return False
    if not (folder / SAVING).exists():
        return True
    try:
        named = (folder.parent / TRACKER).read_bytes().strip()
    except OSError:
        return False
    return named == str(step_number(folder)).encode()
