"""Where a distillation stands: ``distill.json`` in the run's folder.

It holds the settings, what the documents were, and the stages that are done. The same command goes
on from there. Settings that differ are refused by name: a run is one recipe from its first row to
its report.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from cartridge_distill.cartridge.run_folder import (
    CHECKPOINTS_FOLDER,
    METRICS_FILE,
    RECIPE_FILE,
    RUN_FILES,
)
from cartridge_distill.util import json_text
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.files import OWNED, check_own, fresh_folder, replace_file
from cartridge_distill.util.next_command import shorter
from cartridge_distill.util.same_settings import check_same_settings
from cartridge_distill.util.tracker import tracked_step
from verl_patches.pipeline.settings import Distillation

STATE_FILE = "distill.json"
DATA, TRAINING, EVALUATION, REPORT = "data", "training", "evaluation", "report"
STAGES = (DATA, TRAINING, EVALUATION, REPORT)


class State:
    """What is known of a run's folder.

    Attributes:
        done: stages that ended well, in order.
        facts: what a stage found out and later ones need: ``questions``, ``seconds``.
        is_new: nothing of it is on the disk yet.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], documents: str) -> None:
        self.folder, self._settings, self._documents = folder, settings, documents
        self.done: list[str] = []
        self.facts: dict[str, Any] = {}
        self.is_new = True
        self._locked: int | None = None

    @property
    def finished(self) -> bool:
        return all(stage in self.done for stage in STAGES)

    def finish(self, stage: str, **facts: Any) -> None:
        """Takes down that a stage ended well."""
        self.done.append(stage)
        self.facts |= facts
        self.write()

    def lock(self) -> None:
        """Keeps others out of the folder until :meth:`release`, or the end of this process.

        Raises:
            ConfigError: another one works there.
        """
        mark = self.folder / OWNED
        if not mark.is_file():
            return
        self.release()
        self._locked = os.open(mark, os.O_RDONLY)
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ConfigError(
                f"another command works in {shorter(self.folder)}; fix: wait for its end, or name "
                "another --out"
            ) from None

    def release(self) -> None:
        """Lets others in."""
        if self._locked is not None:
            os.close(self._locked)
            self._locked = None

    def write(self) -> None:
        said = {
            "settings": self._settings,
            "documents": self._documents,
            "done": self.done,
            "facts": self.facts,
        }

        def write(file: Path) -> None:
            file.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")

        replace_file(self.folder / STATE_FILE, write, overwrite=True)


def check_folder(settings: Distillation, overwrite: bool) -> State:
    """The state of the run's folder, or of a new one; nothing is written.

    Raises:
        ConfigError: the folder holds another run, or one with other settings or documents; or its
            state cannot be read.
        FileExistsError: it holds what no run wrote.
    """
    folder = settings.out
    fixed, documents = settings.fixed(), documents_sha256(settings.documents)
    if settings.questions is not None:
        documents += f" {documents_sha256(settings.questions)}"
    new = State(folder, json.loads(json.dumps(fixed)), documents)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return new
    new.lock()
    try:
        return _of_folder(settings, new, fixed, documents, overwrite)
    except BaseException:
        new.release()
        raise


def _of_folder(
    settings: Distillation, new: State, fixed: dict[str, Any], documents: str, overwrite: bool
) -> State:
    folder = settings.out
    if overwrite:
        check_own(folder, RUN_FILES)
        return new
    if not folder.is_dir() or not (folder / OWNED).is_file():
        raise FileExistsError(_not_a_run(folder))
    if not (folder / STATE_FILE).is_file():
        left = [name for name in (RECIPE_FILE, METRICS_FILE) if (folder / name).exists()]
        what = f"a run that did not begin here ({', '.join(left)})" if left else "no run's state"
        raise ConfigError(
            f"--out {shorter(folder)} holds {what}; fix: name another --out, or --overwrite it"
        )
    said = _read(folder / STATE_FILE)
    try:
        _check_same(settings, said, fixed, documents)
    except ConfigError:
        if TRAINING in said["done"] or tracked_step(folder / CHECKPOINTS_FOLDER) is not None:
            raise
        check_own(folder, RUN_FILES)  # no step was trained with the others: nothing is lost
        return new
    new.done, new.facts, new.is_new = list(said["done"]), dict(said["facts"]), False
    return new


def _check_same(
    settings: Distillation, said: dict[str, Any], fixed: dict[str, Any], documents: str
) -> None:
    folder = shorter(settings.out)
    check_same_settings(
        said["settings"],
        fixed,
        f"{folder} holds a run with other settings; fix: give the same, name another --out, or "
        "--overwrite it:",
    )
    if said["documents"] != documents:
        raise ConfigError(
            f"{' or '.join(filter(None, (settings.documents, settings.questions)))} has changed "
            f"since {folder} began; fix: name another --out for the new text, or --overwrite the "
            "run"
        )


def begin(state: State) -> None:
    """Makes the folder where the run is new; what there was in it was looked at before."""
    if state.is_new:
        fresh_folder(state.folder, RUN_FILES)
        state.is_new = False
        state.lock()
    state.write()


def _not_a_run(folder: Path) -> str:
    if not folder.is_dir():
        return f"--out {folder} is a file; fix: name a folder"
    return (
        f"--out {folder} holds files that this command did not write; fix: name another folder, "
        "or move them away"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        said = json_text.load(file, file_names=True)
        found = {name: said[name] for name in ("settings", "documents", "done", "facts")}
    except (json_text.JsonError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}); fix: name another --out, or --overwrite the run"
        ) from error
    return found


def documents_sha256(documents: str) -> str:
    """One hash of a file, or of all files of a folder and their names; of a URL, its words."""
    path = Path(documents).expanduser()
    digest = hashlib.sha256()
    if not path.exists():
        digest.update(os.fsencode(documents))
        return digest.hexdigest()
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    for file in files:
        with file.open("rb") as handle:
            content = hashlib.file_digest(handle, "sha256").hexdigest()
        name = file.name if file == path else file.relative_to(path).as_posix()
        digest.update(os.fsencode(f"{name} {content}\n"))
    return digest.hexdigest()
