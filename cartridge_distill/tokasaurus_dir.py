"""What a Tokasaurus server reads for ``source: "local"``: ``cartridge.pt`` and ``config.yaml``.

Written whole or not at all: a temporary directory beside the target is filled, flushed to the disk
and renamed. Needs torch alone, as the gateway does; reading is in ``checkpoint``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import yaml

from cartridge_distill.snapshot import Snapshot

TOKASAURUS_WEIGHTS = "cartridge.pt"
TOKASAURUS_CONFIG = "config.yaml"


def write_snapshot(
    snapshot: Snapshot,
    directory: str | Path,
    base_model: str,
    more_files: Mapping[str, str] | None = None,
) -> Path:
    """Writes one version: plain lists of tensors, the token count also in ``config.yaml``.

    Args:
        base_model: recorded; the real server reads it and does not check it.
        more_files: further text files of the directory, by name.

    Raises:
        FileExistsError: the directory is there; the server never loads an id twice.
    """

    def write(scratch: Path) -> None:
        torch.save(snapshot.parts, scratch / TOKASAURUS_WEIGHTS)
        config = {
            "kv_cache_initializer": {"max_tokens": snapshot.num_tokens},
            "model": {"pretrained_model_name_or_path": base_model},
        }
        (scratch / TOKASAURUS_CONFIG).write_text(yaml.safe_dump(config))
        for name, text in (more_files or {}).items():
            (scratch / name).write_text(text)

    replace_directory(Path(directory), write, overwrite=False)
    return Path(directory)


def replace_directory(target: Path, write: Callable[[Path], None], overwrite: bool) -> None:
    """Fills a temporary directory beside ``target``, then renames it into place.

    Raises:
        FileExistsError: ``target`` is there and ``overwrite`` is false.
    """
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} is already there; a written version is never changed")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write(scratch)
        for file in scratch.iterdir():
            _flush(file)
        scratch.chmod(0o755)  # mkdtemp makes it 0700; the server may run as another user
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, old)
            os.replace(scratch, target)
            shutil.rmtree(old)
        else:
            os.replace(scratch, target)
        _flush(target.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _flush(path: Path) -> None:
    """After a crash of the machine a name must not stand for half a file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
