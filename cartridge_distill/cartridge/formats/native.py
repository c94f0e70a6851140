"""The native format: a directory with ``cartridge.safetensors`` and a readable ``cartridge.json``.

The only format that keeps all that is known: base model and revision, step, document, recipe,
metrics. Training writes float32, the dtype of the master weights; a conversion writes the dtype it
found. The JSON holds two hashes, of the tensors and of itself (``content_hash``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from cartridge_distill.cartridge.content_hash import (
    HASHES,
    TENSORS,
    check_entries,
    check_hashes,
    sha256_of,
)
from cartridge_distill.cartridge.formats.file_names import FILES, META_FILE, WEIGHTS_FILE
from cartridge_distill.cartridge.formats.known_keys import read_safetensors, refuse_unknown
from cartridge_distill.cartridge.formats.stored_cartridge import (
    CartridgeMeta,
    StoredCartridge,
    checked_snapshot,
)
from cartridge_distill.cartridge.snapshot import PARTS
from cartridge_distill.util import json_text
from cartridge_distill.util.errors import CartridgeFormatError, with_fix
from cartridge_distill.util.files import replace_directory, replace_file
from cartridge_distill.util.sealed import sealed

__all__ = ["FILES", "META_FILE", "WEIGHTS_FILE", "read", "write"]
_FORMAT = "cartridge-distill/1"
_ANOTHER_COPY = "take another copy of it"


def read(path: Path) -> StoredCartridge:
    """Reads a directory.

    Raises:
        CartridgeFormatError: a file is missing or broken, holds what is not known here, the JSON is
            about another cartridge, or one of them is not as it was written.
    """
    described = read_json(path)
    weights = path / WEIGHTS_FILE
    tensors = read_safetensors(weights)
    layers = len(tensors) // len(PARTS)
    names = {f"{part}.{layer}" for part in PARTS for layer in range(layers)}
    if tensors.keys() != names:
        odd = sorted(tensors.keys() ^ names)[:4]
        raise CartridgeFormatError(f"{weights}: tensors missing or unknown: {', '.join(odd)}")
    parts = {part: [tensors[f"{part}.{layer}"] for layer in range(layers)] for part in PARTS}
    snapshot = checked_snapshot(parts, str(weights))
    try:
        cartridge = StoredCartridge(snapshot, CartridgeMeta.from_dict(described))
    except CartridgeFormatError as error:
        raise CartridgeFormatError(f"{path / META_FILE}: {error}") from None
    about_tensors = {**cartridge.shape(), "dtype": cartridge.dtype_name()}
    known = {"format", *about_tensors, *cartridge.meta.as_dict(), *HASHES}
    refuse_unknown(described, known, str(path / META_FILE))
    for name, found in about_tensors.items():
        if described.get(name) != found:
            raise CartridgeFormatError(
                f"{path / META_FILE} says {name}={described.get(name)}, {WEIGHTS_FILE} has {found}"
            )
    sha256 = sha256_of(tensor for _, tensor in snapshot.items())
    check_hashes(sha256, described, weights, path / META_FILE)
    return replace(cartridge, sha256=described.get(TENSORS))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON of a directory.

    Raises:
        CartridgeFormatError: it is missing, or not of this format.
    """
    file = path / META_FILE
    if not file.is_file():
        raise CartridgeFormatError(
            f"{file} is not there, so {path} is no cartridge of ours; fix: name the folder of one"
        )
    try:
        described = json_text.load(file)
    except json_text.JsonError as error:
        raise CartridgeFormatError(with_fix(f"{file} {error}", _ANOTHER_COPY)) from error
    if not isinstance(described, dict) or described.get("format") != _FORMAT:
        raise CartridgeFormatError(f"{file} does not say format={_FORMAT!r}; fix: {_ANOTHER_COPY}")
    return described


def write(cartridge: StoredCartridge, path: Path, overwrite: bool = False) -> None:
    """Writes a directory.

    Raises:
        CartridgeFormatError: nobody has said which model it is for.
        FileExistsError: it is there and ``overwrite`` is false.
    """
    cartridge.base_model()
    described = {
        "format": _FORMAT,
        **cartridge.shape(),
        "dtype": cartridge.dtype_name(),
        **cartridge.meta.as_dict(),
        TENSORS: sha256_of(tensor for _, tensor in cartridge.snapshot.items()),
    }

    def fill(scratch: Path) -> None:
        save_file(dict(cartridge.snapshot.items()), scratch / WEIGHTS_FILE)
        _write_json(described, scratch / META_FILE)

    replace_directory(path, fill, overwrite)


def record(path: Path, recipe: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    """Adds to what a directory says of itself; its tensors stay as they are.

    Raises:
        CartridgeFormatError: it is not of this format, or not as it was written.
    """
    described = read_json(path)
    check_entries(described, path / META_FILE)
    meta = CartridgeMeta.from_dict(described)
    meta.recipe |= recipe
    meta.metrics |= metrics
    changed = described | meta.as_dict()
    replace_file(path / META_FILE, lambda file: _write_json(changed, file), overwrite=True)


def _write_json(described: Mapping[str, Any], file: Path) -> None:
    text = json.dumps(sealed(described), indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")
