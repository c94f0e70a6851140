"""The ``.pt`` file of HazyResearch's cartridges, in both spellings.

A ``torch.save`` of a dict of four lists, one tensor ``[1, H, tokens, D]`` per layer. The frozen
part is called ``fixed_*`` until mid-2025 and ``frozen_*`` since; the lists are ``nn.ParameterList``
where upstream wrote them and plain lists elsewhere. All of that is read. Written is what upstream
writes today: ``frozen_*``, ``nn.ParameterList``. (Its own reader then takes the number of frozen
tokens from the wrong axis, that of the heads; the tensors are right.)

Unpickling is restricted to tensors, containers and ``nn.ParameterList``: what else a file asks for
is refused before it runs.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cartridge_distill.cartridge.formats.stored_cartridge import (
    NO_FROZEN_TOKEN,
    CartridgeMeta,
    StoredCartridge,
    checked_snapshot,
)
from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.files import replace_file

_SPELLINGS = (("fixed_keys", "fixed_values"), ("frozen_keys", "frozen_values"))


def read(path: Path, mapped: bool = False) -> StoredCartridge:
    """Reads a ``.pt`` file. It says nothing about its model.

    Args:
        mapped: the tensors stay in the file, for a caller who copies them at once and knows that
            nobody shortens it meanwhile.

    Raises:
        CartridgeFormatError: not such a file, or one that holds other objects than tensors.
        OSError: it cannot be opened.
    """
    data = _unpickle(path, mapped)
    if not isinstance(data, dict):
        raise CartridgeFormatError(
            f"{path} holds a {type(data).__name__}, expected a dict of KV lists"
        )
    spelling = next((names for names in _SPELLINGS if names[0] in data), None)
    if spelling is None:
        reason = NO_FROZEN_TOKEN if "trainable_keys" in data else "it is no cartridge"
        raise CartridgeFormatError(
            f"{path} has neither fixed_keys nor frozen_keys (it has {sorted(map(str, data))}): "
            f"{reason}"
        )
    names = {
        "frozen_keys": spelling[0],
        "frozen_values": spelling[1],
        "trainable_keys": "trainable_keys",
        "trainable_values": "trainable_values",
    }
    missing = [name for name in names.values() if name not in data]
    if missing:
        raise CartridgeFormatError(f"{path} lacks {missing}")
    parts = {ours: _tensors(data[theirs], theirs, path) for ours, theirs in names.items()}
    return StoredCartridge(checked_snapshot(parts, str(path)), CartridgeMeta(base_model=None))


def write(cartridge: StoredCartridge, path: Path, overwrite: bool = False) -> None:
    """Writes a ``.pt`` file as upstream does.

    Raises:
        CartridgeFormatError: the name does not end in ``.pt``, by which readers know it.
        FileExistsError: it is there and ``overwrite`` is false.
    """
    if path.suffix != ".pt":
        raise CartridgeFormatError(f"{path}: the name of a file that ends in .pt is wanted")
    data = {
        name: nn.ParameterList(
            nn.Parameter(tensor, requires_grad=name.startswith("trainable")) for tensor in tensors
        )
        for name, tensors in cartridge.snapshot.parts.items()
    }
    replace_file(path, lambda scratch: torch.save(data, scratch), overwrite)


def _unpickle(path: Path, mapped: bool) -> Any:
    with path.open("rb") as file:
        try:
            # Files of torch before 1.6 are no zip, and cannot be mapped.
            mapped = mapped and zipfile.is_zipfile(file)
            file.seek(0)
            source = str(path) if mapped else file
            with torch.serialization.safe_globals([nn.ParameterList, nn.Parameter]):
                return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # a malformed file can fail in any way there is, OSError too
            reason = str(error).split("\n", 1)[0] or type(error).__name__
            raise CartridgeFormatError(
                f"{path} cannot be read safely as a cartridge: {reason}"
            ) from error


def _tensors(value: object, name: str, path: Path) -> list[Tensor]:
    """The tensors of a plain list or a ``ParameterList``, whose state a file may have made up."""
    tensors: list[Any] = []
    if isinstance(value, (list, tuple)):
        tensors = list(value)
    elif isinstance(value, nn.ParameterList):
        parameters = value.__dict__.get("_parameters")
        if isinstance(parameters, dict):
            # By number, as ParameterList itself does: a pickled dict may have any order.
            tensors = [parameters.get(str(layer)) for layer in range(len(parameters))]
    else:
        raise CartridgeFormatError(f"{path}: {name} is a {type(value).__name__}, not a list")
    if not all(isinstance(tensor, Tensor) and tensor.dim() == 4 for tensor in tensors):
        raise CartridgeFormatError(f"{path}: {name} must be a list of [1, H, tokens, D] tensors")
    return tensors
