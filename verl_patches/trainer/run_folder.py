"""The folder of a run, ``trainer.default_local_dir``: which checkpoint is whole, which is the last.

::

    global_step_7/actor/     the engine's, see engine_state
    global_step_7/data.pt    where the data stood, and what data it was
    global_step_7/.saving    while it is written, until the tracker names it
    history.jsonl            the numbers of all steps so far, see history
    best.json                the validations' KL; the best step's checkpoint is kept
    latest_checkpointed_iteration.txt    "7"; written last
    .running                 locked by the run that trains here
    runs.txt                 a run id for every start, see verl_patches/rollout/run_ids.py

Cartridge and state, position, history and tracker appear whole or not at all, and a checkpoint is
complete when the tracker names it: a save that is killed leaves the one before in force. veRL
writes ``data.pt`` and the tracker in place, reads the former with pickle, and takes a tracker that
is gone, or whose folder is gone, for a run from scratch; here that is an error.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from cartridge_distill.cartridge.formats.stored_tensors import check_archive
from cartridge_distill.util.best_step import read_best
from cartridge_distill.util.errors import CartridgeFormatError, ConfigError
from cartridge_distill.util.files import replace_file
from cartridge_distill.util.tracker import (
    DATA_FILE,
    SAVING,
    TRACKER,
    has_both_parts,
    how_to_go_on,
    is_whole,
    saved_steps,
    step_folder,
    step_number,
    tracked_step,
)
from verl_patches.actor.engine_state import check_same_run

__all__ = [
    "DATA_FILE",
    "LOCK",
    "TRACKER",
    "begin_save",
    "check_shared",
    "checkpoint_to_resume",
    "claim",
    "keep_newest",
    "last_complete",
    "mark_complete",
    "read_data_position",
    "step_folder",
    "step_of_folder",
    "write_data_position",
]
LOCK = ".running"


def claim(run: Path, wait_s: float = 60.0) -> int:
    """Makes this process the only one that trains in a folder, until it ends.

    A scheduler may start a job again while the old one still dies, or still lives behind a network
    that failed; both would save steps into the same folder. The lock goes with the process, also
    when that is killed, so a run that is restarted finds it free.

    Args:
        wait_s: how long a run that is on its way out is waited for.

    Returns:
        The file descriptor that holds the lock.

    Raises:
        ConfigError: another run trains there.
    """
    run.mkdir(parents=True, exist_ok=True)
    handle = os.open(run / LOCK, os.O_RDWR | os.O_CREAT)
    deadline = time.monotonic() + wait_s
    is_told = False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(handle)
                raise ConfigError(
                    f"another run trains in {run} (it holds {LOCK}); fix: wait for its end, or end "
                    "it, or give another trainer.default_local_dir"
                ) from None
        if not is_told:
            is_told = True
            print(f"[cartridge] {run} is in use; waiting for {wait_s:.0f} s", flush=True)
        time.sleep(0.5)


def step_of_folder(folder: Path) -> int:
    """Raises ConfigError when the folder is not called ``global_step_<number>``."""
    step = step_number(folder)
    if step is None:
        raise ConfigError(
            f"trainer.resume_from_path={str(folder)!r}: no checkpoint's; fix: name its own folder, "
            "<run>/global_step_<number>"
        )
    return step


def last_complete(run: Path) -> Path | None:
    """The checkpoint that the tracker names; None for a run that has saved none.

    Raises:
        CartridgeFormatError: the tracker is damaged, or gone while checkpoints are there, or what
            it names is not there. Nothing is deleted.
    """
    step = tracked_step(run)
    if step is None:
        return None
    folder = step_folder(run, step)
    if not has_both_parts(folder):
        raise CartridgeFormatError(
            f"{run / TRACKER} names {folder}, which is not complete; {how_to_go_on(run)}"
        )
    return folder


def checkpoint_to_resume(mode: str, run: Path, given: str | None) -> Path | None:
    """What ``trainer.resume_mode`` asks for; None for a run from the start.

    Args:
        mode: "auto" (go on where this folder stands), "disable" or "resume_path".
        run: ``trainer.default_local_dir``.
        given: ``trainer.resume_from_path``.

    Raises:
        ConfigError: a run from the start or from elsewhere would be mixed into one that is there,
            or nothing is at the given path.
        CartridgeFormatError: see :func:`last_complete`.
    """
    if mode == "resume_path":
        if not given:
            raise ConfigError(
                f"trainer.resume_from_path={given!r} with resume_mode=resume_path; fix: name one "
                f"of {[str(other) for other in _saved(run)]}"
            )
        folder = Path(given).expanduser().absolute()
        step_of_folder(folder)
        if not is_whole(folder):
            raise ConfigError(
                f"trainer.resume_from_path={given!r}: there is no complete checkpoint; fix: "
                f"name one of {[str(other) for other in _saved(folder.parent)]}"
            )
        if folder.parent.resolve() != run.resolve() and (there := saved_steps(run)):
            raise ConfigError(
                f"trainer.resume_from_path={given!r}, and {run} holds a run saved up to step "
                f"{there[-1]}: its checkpoints and new ones would be mixed; fix: set "
                "trainer.resume_mode=auto to go on with that one, or give another "
                "trainer.default_local_dir"
            )
        return folder
    found = last_complete(run)
    if mode == "disable" and found is not None:
        raise ConfigError(
            f"trainer.resume_mode=disable, and {run} holds a run saved up to step "
            f"{step_of_folder(found)}: its checkpoints and new ones would be mixed; fix: set "
            "trainer.resume_mode=auto to go on with it, give another trainer.default_local_dir, "
            "or delete the folder"
        )
    return found


def check_shared(saved: Path) -> None:
    """What a worker saved must be where the trainer, maybe on another node, looks for it.

    Raises:
        ConfigError: it is not.
    """
    if not saved.is_dir():
        raise ConfigError(
            f"rank 0 has saved {saved} and this node does not see it; fix: on several nodes "
            "put trainer.default_local_dir on a disk that all of them share"
        )


def begin_save(folder: Path) -> None:
    """Marks a checkpoint as not whole, before its first file is written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SAVING).touch()


def write_data_position(folder: Path, position: dict[str, Any], about: dict[str, Any]) -> None:
    """Saves the data loader's state and what data it walks through."""

    def write(file: Path) -> None:
        torch.save({"loader": position, "about": about}, file)

    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / DATA_FILE, write, overwrite=True)


def read_data_position(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The data loader's state.

    Raises:
        ConfigError: the data or the batches differ from those of the saved run.
        CartridgeFormatError: the file is no data position, or holds more than plain values.
    """
    file = folder / DATA_FILE
    try:
        with file.open("rb") as source:
            check_archive(source, file, with_checksums=True)
        saved = torch.load(file, map_location="cpu", weights_only=True)
        position, saved_about = dict(saved["loader"]), dict(saved["about"])
    except Exception as error:  # a damaged file can fail in any way there is
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise CartridgeFormatError(
            f"{file} cannot be read as a data position: {reason}; {how_to_go_on(folder.parent)}"
        ) from error
    check_same_run(saved_about, about, folder)
    return position


def mark_complete(run: Path, step: int) -> None:
    """The last write of a save: from here on, ``auto`` finds this checkpoint."""

    def write(file: Path) -> None:
        file.write_text(str(step))

    replace_file(run / TRACKER, write, overwrite=True)
    (step_folder(run, step) / SAVING).unlink(missing_ok=True)


def keep_newest(run: Path, step: int, keep: int | None) -> list[Path]:
    """Deletes what is older than the newest ``keep`` complete checkpoints up to ``step``.

    The best step of the validations stays as well.

    What a killed save left behind goes as well. Later steps are of a timeline that was left with
    ``resume_path``; they stay until this run has saved steps of its own there.

    Args:
        keep: None keeps all that is complete.
    """
    whole = set(saved_steps(run))
    past = sorted(n for n in map(step_number, run.iterdir()) if n is not None and n <= step)
    kept = [n for n in past if n in whole]
    best = read_best(run, step)
    kept = [n for n in kept if keep is None or n in kept[-keep:] or (best and n == best.step)]
    gone = [step_folder(run, n) for n in past if n not in kept]
    for folder in gone:
        shutil.rmtree(folder)
    for n in kept:
        for leftover in step_folder(run, n).glob(".*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return gone


def _saved(run: Path) -> list[Path]:
    """Folders that are whole, oldest first."""
    return [step_folder(run, step) for step in saved_steps(run)]
