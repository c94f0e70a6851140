"""A model's config and tokenizer, from a folder or the Hub; what cannot be read is named.

What a folder says at once is looked at before transformers is imported, which takes seconds. The
libraries underneath say it in many ways (a mistyped folder is taken for a hub id, and a Git LFS
pointer in place of weights has a "header too large"). Every command reads a model through here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cartridge_distill.util.errors import CartridgeDistillError, ConfigError
from cartridge_distill.util.lfs import about, pointer_in

_FIX = "fix: give the folder of a model (its config.json and tokenizer files lie there) or a hub id"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read_tokenizer(name_or_path: str | Path) -> Any:
    """The tokenizer of a model.

    Raises:
        ConfigError: there is none that can be read, with the reason.
    """
    from transformers import AutoTokenizer

    with reading(name_or_path, "tokenizer"):
        return AutoTokenizer.from_pretrained(_place(name_or_path))


def read_model_config(name_or_path: str | Path) -> Any:
    """The transformers config of a model.

    Raises:
        ConfigError: there is none that can be read, with the reason.
    """
    from transformers import AutoConfig

    with reading(name_or_path, "config"):
        return AutoConfig.from_pretrained(_place(name_or_path))


@contextmanager
def reading(name_or_path: str | Path, what: str) -> Iterator[None]:
    """Around the reading of a model's files: what goes wrong is a ConfigError.

    Args:
        what: of the model is read, for the message.
    """
    check_place(name_or_path)
    name, folder = str(name_or_path), Path(name_or_path).expanduser()
    try:
        yield
    except CartridgeDistillError:
        raise
    except Exception as error:  # a malformed file can fail in any way there is
        where = "" if folder.is_dir() else " (no folder of that name is here, so it is a hub id)"
        raise ConfigError(
            f"{name}{where}: its {what} cannot be read: {_reason(error, folder)}; {_FIX}"
        ) from error


def check_place(name_or_path: str | Path) -> None:
    """What can be known at once, without the libraries that read a model: is there one?

    Raises:
        ConfigError: a path that is not there, a file, a folder without a model, or one with
            pointers in place of files.
    """
    name, folder = str(name_or_path), Path(name_or_path).expanduser()
    if not folder.is_dir():
        _check_hub_id(name, folder)
    elif (pointer := pointer_in(folder)) is not None:
        raise ConfigError(about(pointer))


def check_model_place(name_or_path: str | Path) -> None:
    """As :func:`check_place`; a folder must have a config besides, as a tokenizer's need not.

    Raises:
        ConfigError: no model lies there.
    """
    check_place(name_or_path)
    folder = Path(name_or_path).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{name_or_path}: the folder holds no model, for it has no config.json; {_FIX}"
        )


def _place(name_or_path: str | Path) -> str:
    """transformers takes ``~`` for a name."""
    folder = Path(name_or_path).expanduser()
    return str(folder) if folder.is_dir() else str(name_or_path)


def _check_hub_id(name: str, folder: Path) -> None:
    """A path that is mistyped is not looked for on the Hub."""
    if folder.is_file():
        raise ConfigError(f"{name} is a file, not a model; {_FIX}")
    if _HUB_ID.fullmatch(name) is None:
        raise ConfigError(f"{name}: there is no such folder; {_FIX}")


def _reason(error: Exception, folder: Path) -> str:
    if folder.is_dir() and not any(folder.iterdir()):
        return "the folder is empty"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]).rstrip(".")
    kind = type(error).__name__
    return said if isinstance(error, OSError | ValueError) and said else f"{kind} {said}".strip()
