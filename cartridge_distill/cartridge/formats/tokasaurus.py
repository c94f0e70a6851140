"""What a Tokasaurus server reads for ``source: "local"``: ``cartridge.pt`` and ``config.yaml``.

``cartridge.pt`` holds plain lists here, for readers that allow nothing but tensors;
``config.yaml`` repeats the number of tokens, which the server compares, and names the base model,
which it does not. The server itself unpickles without any restriction: give it only files that
were written or read here.

Upstream's training leaves its whole configuration as ``config.yaml``. That is a record of the
training, of any age and with any settings, and none of them changes what the tensors mean: of such
a file the two entries above are read. A file that is no such record holds those two alone.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from cartridge_distill.cartridge.formats import hazyresearch
from cartridge_distill.cartridge.formats.known_keys import refuse_unknown
from cartridge_distill.cartridge.formats.stored_cartridge import CartridgeMeta, StoredCartridge
from cartridge_distill.cartridge.kv_shape import PAGE_TOKENS
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.files import replace_directory

TOKASAURUS_WEIGHTS = "cartridge.pt"
TOKASAURUS_CONFIG = "config.yaml"
FILES = (TOKASAURUS_WEIGHTS, TOKASAURUS_CONFIG)
_KNOWN = ("kv_cache_initializer", "model")
_OF_A_TRAINING = frozenset({"dataset", "epochs", "lr", "optimizer", "_wandb", "wandb_version"})


def read(path: Path) -> StoredCartridge:
    """Reads a directory and checks it as the server does.

    Raises:
        CartridgeFormatError: a file is missing, or the token counts of the two files differ.
    """
    for name in FILES:
        if not (path / name).is_file():
            raise CartridgeFormatError(f"{path / name} is missing")
    config = read_config(path / TOKASAURUS_CONFIG)
    cartridge = hazyresearch.read(path / TOKASAURUS_WEIGHTS)
    declared = declared_tokens(config)
    if declared != cartridge.snapshot.num_tokens:
        raise CartridgeFormatError(
            f"{path / TOKASAURUS_CONFIG}: kv_cache_initializer.max_tokens={declared}, "
            f"but {TOKASAURUS_WEIGHTS} holds {cartridge.snapshot.num_tokens} tokens"
        )
    return StoredCartridge(cartridge.snapshot, CartridgeMeta(base_model_of(config)))


def write(cartridge: StoredCartridge, path: Path, overwrite: bool = False) -> None:
    """Writes a directory.

    Raises:
        CartridgeFormatError: nobody has said which model it is for, or the cartridge does not
            fill whole pages.
        FileExistsError: it is there and ``overwrite`` is false.
    """
    tokens = cartridge.snapshot.num_tokens
    if tokens % PAGE_TOKENS:
        raise CartridgeFormatError(
            f"{tokens} tokens are not a multiple of {PAGE_TOKENS}, the page of Tokasaurus, whose "
            f"model worker dies of such a cartridge; fix: train one of a multiple of {PAGE_TOKENS} "
            "tokens"
        )
    write_snapshot(
        cartridge.snapshot, path, cartridge.base_model(), overwrite=overwrite, checksums=True
    )


def write_snapshot(
    snapshot: Snapshot,
    directory: str | Path,
    base_model: str,
    more_files: Mapping[str, str] | None = None,
    overwrite: bool = False,
    checksums: bool = False,
) -> Path:
    """Writes one version: plain lists of tensors, the token count also in ``config.yaml``.

    Args:
        base_model: recorded; the real server reads it and does not check it.
        more_files: further text files of the directory, by name.
        checksums: of the numbers, in the zip that ``cartridge.pt`` is. Readers here compare them;
            they take longer than the writing, so a version that is served at once has none.

    Raises:
        FileExistsError: the directory is there; the server never loads an id twice.
        DiskFull: there is no room for it.
    """

    def fill(scratch: Path) -> None:
        weights = scratch / TOKASAURUS_WEIGHTS
        torch.save(snapshot.parts, weights) if checksums else _save(snapshot.parts, weights)
        write_config(scratch, snapshot.num_tokens, base_model)
        for name, text in (more_files or {}).items():
            (scratch / name).write_text(text)

    replace_directory(Path(directory), fill, overwrite)
    return Path(directory)


def write_config(directory: Path, num_tokens: int, base_model: str) -> None:
    """Writes ``config.yaml``."""
    config = {
        "kv_cache_initializer": {"max_tokens": num_tokens},
        "model": {"pretrained_model_name_or_path": base_model},
    }
    (directory / TOKASAURUS_CONFIG).write_text(yaml.safe_dump(config))


def lay_out(
    tensors: Iterable[tuple[str, Sequence[int]]], dtype: torch.dtype, path: Path
) -> dict[str, int]:
    """Writes a ``cartridge.pt`` in which the tensors' bytes are left out.

    Whoever gets them piece by piece writes each where it belongs, and nothing twice.

    Args:
        tensors: ``("frozen_keys.0", [1, H, tokens, D])``, ..., layers in order.

    Returns:
        The place in the file of each tensor's first byte; its bytes are contiguous.

    Raises:
        CartridgeFormatError: this torch lays a tensor out with another number of bytes.
    """
    parts: dict[str, list[Tensor]] = {}
    numbered: list[tuple[str, Tensor]] = []
    for name, shape in tensors:
        # Never touched, so it takes no memory.
        tensor = torch.empty(*shape, dtype=dtype)
        parts.setdefault(name.rpartition(".")[0], []).append(tensor)
        numbered.append((name, tensor))
    with torch.serialization.skip_data():
        torch.save(parts, path)
    places = _records(path)
    found = {}
    # torch numbers tensors as it meets them.
    for number, (name, tensor) in enumerate(numbered):
        start, size = places[str(number)]
        if size != tensor.nbytes:
            raise CartridgeFormatError(
                f"torch {torch.__version__} lays {name} out with {size} bytes, not {tensor.nbytes}"
            )
        found[name] = start
    return found


def _records(path: Path) -> dict[str, tuple[int, int]]:
    """First byte and length of each ``data/`` record of a ``torch.save``, which is a zip."""
    places = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for record in archive.infolist():
            folder, _, name = record.filename.rpartition("/")
            if folder.rpartition("/")[2] != "data":
                continue
            # A name and padding of any length stand between the record's header and its data.
            file.seek(record.header_offset + 26)
            name_length, padding = struct.unpack("<HH", file.read(4))
            places[name] = (record.header_offset + 30 + name_length + padding, record.file_size)
    return places


def _save(parts: object, path: Path) -> None:
    """``torch.save`` without the checksums in its zip, which ``torch.load`` never looks at.

    They take longer than the writing. What comes over the network has a SHA-256 of its own.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(parts, path)
    finally:
        torch.serialization.set_crc32_options(before)


def read_config(path: Path) -> Any:
    """The YAML of a directory.

    Raises:
        CartridgeFormatError: it cannot be read without running code, or at all, or it has keys that
            are not known here.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception as error:  # dates, numbers of any length, keys that are none: in any way
        reason = str(error) or type(error).__name__
        raise CartridgeFormatError(f"{path} cannot be read: {reason}") from error
    if isinstance(config, dict) and not _OF_A_TRAINING & config.keys():
        refuse_unknown(config, _KNOWN, str(path))
    return config


def declared_tokens(config: Any) -> Any:
    """``kv_cache_initializer.max_tokens`` of a ``config.yaml``, in either place; None without."""
    return _setting(config, "kv_cache_initializer", "max_tokens")


def base_model_of(config: Any) -> str | None:
    """The base model that a ``config.yaml`` names; None where it names none."""
    name = _setting(config, "model", "pretrained_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _setting(config: Any, section: str, name: str) -> Any:
    """``section.name`` or, as Weights & Biases writes it, ``section.value.name``."""
    there = config.get(section) if isinstance(config, dict) else None
    for place in (there, there.get("value") if isinstance(there, dict) else None):
        if isinstance(place, dict) and name in place:
            return place[name]
    return None
