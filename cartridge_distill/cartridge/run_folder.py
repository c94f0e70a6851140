"""A run's folder in a cartridge's place: which cartridge is meant, and which model it is for.

::

    recipe.json        what repeats the run; its base model, too
    metrics.jsonl      a line a step
    checkpoints/       the training's, `global_step_N`
    cartridge/         what the run is about: its best cartridge, in the native format

Commands that take a cartridge take a run as well: the cartridge at ``RUN/cartridge``. Nothing is
guessed: a run that has none is refused, with what to do. Only small files are read here; torch is
not imported for the formats that training writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cartridge_distill.util import json_text
from cartridge_distill.util.errors import CartridgeFormatError, with_fix
from cartridge_distill.util.next_command import shorter
from cartridge_distill.util.tracker import ENGINE_FOLDER, TRACKER, saved_steps, step_folder

RECIPE_FILE = "recipe.json"
METRICS_FILE = "metrics.jsonl"
CARTRIDGE_FOLDER = "cartridge"
CHECKPOINTS_FOLDER = "checkpoints"
RUN_FILES = (
    *(RECIPE_FILE, METRICS_FILE, "distill.json", "*.log", "report.html"),
    *("data/train.parquet", "data/val.parquet", "data/documents.jsonl", "data/eval.json"),
    *("evaluation/evaluation*.json", "evaluation/evaluation*.parquet", "evaluation/*.jsonl"),
    *(f"{CARTRIDGE_FOLDER}/cartridge.json", f"{CARTRIDGE_FOLDER}/cartridge.safetensors"),
    *(f"{CHECKPOINTS_FOLDER}/**", "cartridges/**", "tensorboard/**", "wandb/**"),
)
"""What a run writes into its folder, as patterns; anything else there is somebody's own."""
_META_FILE, _WEIGHTS_FILE = "cartridge.json", "cartridge.safetensors"  # the native format's
_ADAPTER_FILE = "adapter_config.json"  # PEFT's
_CONFIG_FILE = "config.yaml"  # Tokasaurus'


def is_run(source: str | Path) -> bool:
    """Is it a run's folder, and not a cartridge?"""
    folder = Path(source).expanduser()
    if not str(source) or not folder.is_dir() or any(folder.glob("*.pt")):
        return False
    if any((folder / name).is_file() for name in (_META_FILE, _WEIGHTS_FILE, _ADAPTER_FILE)):
        return False
    if (folder / RECIPE_FILE).is_file() or (folder / METRICS_FILE).is_file():
        return True
    return (folder / CHECKPOINTS_FOLDER / TRACKER).is_file()


def resolve_cartridge(source: str | Path) -> str:
    """``RUN/cartridge`` for a run's folder; anything else as it is.

    Args:
        source: a file, a directory, a hub id, or a run's folder.

    Raises:
        CartridgeFormatError: the run has no cartridge; says what to do.
    """
    if not is_run(source):
        return str(source)
    run = Path(source).expanduser()
    best = run / CARTRIDGE_FOLDER
    if (best / _WEIGHTS_FILE).is_file():
        return str(best)
    raise CartridgeFormatError(f"{source} is a run without a cartridge yet: {_what_to_do(run)}")


def _what_to_do(run: Path) -> str:
    checkpoints = run / CHECKPOINTS_FOLDER
    saved = saved_steps(checkpoints)
    if not saved:
        return (
            f"{best_of(run)} is written when the training ends, and no step was saved so far; fix: "
            "start the run's command again, or name another run"
        )
    newest = step_folder(checkpoints, saved[-1]) / ENGINE_FOLDER / CARTRIDGE_FOLDER
    return (
        f"{best_of(run)} is written when the training ends; fix: start the run's command again "
        f"to finish it, or name the cartridge of step {saved[-1]}: {shorter(newest)}"
    )


def best_of(run: Path) -> str:
    """``RUN/cartridge``, as it is said in a message."""
    return shorter(run / CARTRIDGE_FOLDER)


def model_of(source: str | Path) -> str | None:
    """The base model, folder or hub id, as the run or the cartridge says it.

    Args:
        source: a run's folder, or a cartridge on this disk.

    Returns:
        None where neither says one; so for a hub id, which is not fetched for this.

    Raises:
        CartridgeFormatError: the file that says it cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        path = path.parent if path.name in (_META_FILE, _WEIGHTS_FILE) else path
    if not path.is_dir():
        return None
    if is_run(path):
        said = _text(path / RECIPE_FILE, "model")
        return said or _text(path / CARTRIDGE_FOLDER / _META_FILE, "base_model")
    if (path / _META_FILE).is_file():
        return _text(path / _META_FILE, "base_model")
    if (path / _ADAPTER_FILE).is_file():
        return _text(path / _ADAPTER_FILE, "base_model_name_or_path")
    if (path / _CONFIG_FILE).is_file():
        # It imports torch, which a cartridge in this format needs anyway.
        from cartridge_distill.cartridge.formats.tokasaurus import base_model_of, read_config

        return base_model_of(read_config(path / _CONFIG_FILE))
    return None


def data_of(run: str | Path) -> str | None:
    """The folder of a run's data, as its recipe says it; None where it says nothing."""
    return _text(Path(run).expanduser() / RECIPE_FILE, "data")


def _text(file: Path, name: str) -> str | None:
    """One entry of a JSON file; None where the file is not there or does not say it."""
    if not file.is_file():
        return None
    try:
        found: Any = json_text.load(file)
    except json_text.JsonError as error:
        raise CartridgeFormatError(
            with_fix(f"{file} {error}", "take another copy of the run")
        ) from error
    value = found.get(name) if isinstance(found, dict) else None
    return value if isinstance(value, str) and value else None
