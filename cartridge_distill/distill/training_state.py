"""What training needs besides the cartridge to go on as if it had never stopped.

Two files beside a saved cartridge: ``training_state.safetensors`` (the optimizer's state and the
random number generators) and ``training_state.json`` (how far training is, and what it was set up
with, so that another run's state is refused). Nothing in them depends on the number of ranks, and
nothing in them is code: no file is read with pickle. The JSON holds a hash of the tensors and one
of itself (``content_hash``): a damaged state is refused.

Not here: the cartridge (``checkpoint``), the data position (the trainer's), atomic writing (whoever
fills the directory does that, so that cartridge and state appear together).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from cartridge_distill.cartridge.content_hash import (
    HASHES,
    TENSORS,
    check_hashes,
    sha256_of_named,
)
from cartridge_distill.cartridge.formats.known_keys import read_safetensors, refuse_unknown
from cartridge_distill.model.kept_tokens import Row
from cartridge_distill.util import json_text
from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.sealed import sealed

STATE_FILE = "training_state.safetensors"
ABOUT_FILE = "training_state.json"
FORMAT = "cartridge-distill-training-state/1"
_COUNTS = ("step", "version", "schedule")
_PROMPTS = "teacher_prompts"
_GENERATORS = frozenset({"torch", "numpy", "numpy_gauss", "python", "python_gauss"})


@dataclass(frozen=True)
class TrainingState:
    """Everything but the cartridge.

    Attributes:
        step: optimizer steps done.
        version: batches trained on; the number of the version that is served next.
        schedule: steps of the learning-rate schedule done.
        optimizer: parameter name -> the optimizer's tensors for it, by their names.
        rng: from :func:`rng_state`.
        settings: those that must be the same when training goes on; JSON values.
        prompts: that the teacher keeps, see :mod:`cartridge_distill.distill.kept_prompts`; none in
            states of older versions.
    """

    step: int
    version: int
    schedule: int
    optimizer: dict[str, dict[str, Tensor]]
    rng: dict[str, Tensor]
    settings: dict[str, Any]
    prompts: list[Row] = field(default_factory=list)


def rng_state(device: torch.device | None = None) -> dict[str, Tensor]:
    """The generators of torch, numpy and Python, and of the device when it has one of its own.

    No step draws a number today (the base model has no dropout); kept for what may be added.
    """
    _, numpy_keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    _, python_keys, python_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*map(int, numpy_keys), int(position), int(has_gauss)]),
        "numpy_gauss": torch.tensor([float(gauss)], dtype=torch.float64),
        "python": torch.tensor(python_keys),
        "python_gauss": torch.tensor(
            [] if python_gauss is None else [python_gauss], dtype=torch.float64
        ),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Tensor], device: torch.device | None = None) -> None:
    """Puts back what :func:`rng_state` took; a device state only where there is such a device."""
    torch.set_rng_state(state["torch"])
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(keys, np.uint32), position, has_gauss, state["numpy_gauss"].item())
    )
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    if "cuda" in state and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def save_state(state: TrainingState, directory: str | Path) -> None:
    """Writes both files into a directory that is there.

    Raises:
        CartridgeFormatError: a name that the file could not be read back from.
    """
    tensors: dict[str, Tensor] = {f"rng/{name}": tensor for name, tensor in state.rng.items()}
    for parameter, found in state.optimizer.items():
        for name, tensor in found.items():
            if "/" in parameter or "/" in name:
                raise CartridgeFormatError(f"{parameter!r}, {name!r}: a name must not have a slash")
            tensors[f"optimizer/{parameter}/{name}"] = tensor
    saved = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(saved, Path(directory) / STATE_FILE)
    about = {
        "format": FORMAT,
        "step": state.step,
        "version": state.version,
        "schedule": state.schedule,
        "recipe": state.settings,  # the key of files that are kept
        _PROMPTS: state.prompts,
        TENSORS: sha256_of_named(saved),
    }
    text = json.dumps(sealed(about), indent=2)
    # A line a prompt, not a line a token. No string of JSON has a line's end in it.
    text = re.sub(r"\[\n\s*(\d[\d,\s]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    (Path(directory) / ABOUT_FILE).write_text(text + "\n")


def load_state(directory: str | Path) -> TrainingState:
    """Reads both files.

    Raises:
        CartridgeFormatError: one is missing or is not what :func:`save_state` has written.
    """
    about_path, state_path = Path(directory) / ABOUT_FILE, Path(directory) / STATE_FILE
    if not about_path.is_file() or not state_path.is_file():
        raise CartridgeFormatError(
            f"{directory} has no {ABOUT_FILE} and {STATE_FILE}: a cartridge was saved there "
            "without its optimizer; fix: start a new run that begins with that cartridge"
        )
    try:
        about = json_text.load(about_path)
    except (json_text.JsonError, OSError) as error:
        raise _damaged(about_path, str(error)) from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        told = about.get("format") if isinstance(about, dict) else type(about).__name__
        raise CartridgeFormatError(
            f"{about_path} is in format {told!r:.80}, this program reads {FORMAT!r}; "
            "fix: go on with the version that wrote it"
        )
    try:
        tensors = read_safetensors(state_path)
    except CartridgeFormatError as error:
        raise _damaged(state_path, str(error)) from error
    refuse_unknown(about, {"format", *_COUNTS, "recipe", _PROMPTS, *HASHES}, str(about_path))
    check_hashes(sha256_of_named(tensors), about, state_path, about_path)
    for name in _COUNTS:
        if type(about.get(name)) is not int or about[name] < 0:
            raise _damaged(about_path, f"{name} is {about.get(name)!r:.60}, not a count")
    if not isinstance(about.get("recipe"), dict):
        raise _damaged(about_path, f"recipe is {about.get('recipe')!r:.60}, not an object")
    rng, optimizer = _sorted_out(tensors, state_path)
    counts = {name: about[name] for name in _COUNTS}
    return TrainingState(
        **counts,
        optimizer=optimizer,
        rng=rng,
        settings=about["recipe"],
        prompts=_prompts(about.get(_PROMPTS, []), about_path),
    )


def _prompts(rows: Any, file: Path) -> list[Row]:
    """The prompts of a state, looked at."""

    def is_row(row: Any) -> bool:
        return (
            isinstance(row, list)
            and len(row) == 2
            and (row[0] is None or isinstance(row[0], str))
            and isinstance(row[1], list)
            and bool(row[1])
            and all(isinstance(ids, list) and ids for ids in row[1])
            and all(type(token) is int and token >= 0 for ids in row[1] for token in ids)
        )

    if not isinstance(rows, list) or not all(map(is_row, rows)):
        raise _damaged(file, f"{_PROMPTS} is {rows!r:.60}, not prompts by document")
    return [(document_id, prompts) for document_id, prompts in rows]


def _sorted_out(
    tensors: Mapping[str, Tensor], file: Path
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The generators' and the optimizer's tensors."""
    rng: dict[str, Tensor] = {}
    optimizer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match key.split("/"):
            case ["rng", name]:
                rng[name] = tensor
            case ["optimizer", parameter, name]:
                optimizer.setdefault(parameter, {})[name] = tensor
            case _:
                raise _damaged(file, f"it holds {key[:80]!r}, which is not known here")
    if missing := _GENERATORS - rng.keys():
        raise _damaged(file, f"it lacks {', '.join(sorted(missing))}")
    return rng, optimizer


def _damaged(file: Path, reason: str) -> CartridgeFormatError:
    return CartridgeFormatError(
        f"{file}: the training state is damaged: {reason}. Go on from an earlier checkpoint "
        "(trainer.resume_mode=resume_path), or start a new run that begins with the cartridge"
    )
