"""The ``.pt`` file of HazyResearch's cartridges, in both spellings.

A ``torch.save`` of a dict of four lists, one tensor ``[1, H, tokens, D]`` per layer. The frozen
part is called ``fixed_*`` until mid-2025 and ``frozen_*`` since; the lists are ``nn.ParameterList``
where upstream wrote them and plain lists elsewhere. All of that is read, and any other key is
refused by name. Written are both spellings of the same tensors, which costs no byte of them, in
plain lists: upstream's readers of either age take them, and so does
``torch.load(weights_only=True)``, which refuses ``nn.ParameterList``. (Upstream's newer reader
takes the number of frozen tokens from the wrong axis, that of the heads; the tensors are right.)

Unpickling is restricted to tensors, containers and ``nn.ParameterList``: what else a file asks for
is refused before it runs.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from cartridge_distill.cartridge.formats.known_keys import refuse_unknown
from cartridge_distill.cartridge.formats.stored_cartridge import (
    NO_FROZEN_TOKEN,
    CartridgeMeta,
    StoredCartridge,
    checked_snapshot,
)
from cartridge_distill.cartridge.formats.stored_tensors import check_archive, check_stored
from cartridge_distill.util.disk import DiskFailed, fetch_from_disk, reading_disk
from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.files import replace_file
from cartridge_distill.util.lfs import about, pointer_in

_SPELLINGS = (("frozen_keys", "frozen_values"), ("fixed_keys", "fixed_values"))
_TRAINED = ("trainable_keys", "trainable_values")


def read(path: Path, mapped: bool = False) -> StoredCartridge:
    """Reads a ``.pt`` file. It says nothing about its model.

    Args:
        mapped: the tensors stay in the file, for a caller who copies them at once and knows that
            nobody shortens it meanwhile.

    Raises:
        CartridgeFormatError: not such a file, or one that holds other objects than tensors.
        DiskFailed: its disk does not give it.
        OSError: it cannot be opened.
    """
    data, spellings = _known(path, mapped)
    found = {name: _tensors(value, name, path) for name, value in data.items()}
    for name, tensors in found.items():
        check_stored(tensors, name, path)
    parts = {name: found[name] for name in _TRAINED}
    for ours, names in zip(_SPELLINGS[0], zip(*spellings, strict=True), strict=True):
        parts[ours] = found[names[0]]
        if not all(_same(found[names[0]], found[name]) for name in names[1:]):
            raise CartridgeFormatError(
                f"{path}: {' and '.join(names)} differ; they are two names of the same tokens; "
                "fix: save it with one of them"
            )
    return StoredCartridge(checked_snapshot(parts, str(path)), CartridgeMeta(base_model=None))


def check_keys(path: Path) -> None:
    """Looks at the names in a ``.pt`` file alone, for a server that reads its tensors itself.

    Raises:
        CartridgeFormatError: as :func:`read`, of the names.
    """
    _known(path, mapped=True)


def _known(path: Path, mapped: bool) -> tuple[dict[str, object], list[tuple[str, str]]]:
    """The file's entries, which are all of those that are known, and how it spells "frozen"."""
    data = _unpickle(path, mapped)
    if not isinstance(data, dict):
        raise CartridgeFormatError(
            f"{path} holds a {type(data).__name__}, expected a dict of KV lists"
        )
    spellings = [names for names in _SPELLINGS if names[0] in data]
    if not spellings:
        reason = NO_FROZEN_TOKEN if "trainable_keys" in data else "it is no cartridge"
        raise CartridgeFormatError(
            f"{path} has neither fixed_keys nor frozen_keys (it has {sorted(map(str, data))}): "
            f"{reason}"
        )
    wanted = [*_TRAINED, *(name for names in spellings for name in names)]
    missing = [name for name in wanted if name not in data]
    if missing:
        raise CartridgeFormatError(f"{path} lacks {missing}")
    refuse_unknown(data, wanted, str(path))
    return data, spellings


def write(cartridge: StoredCartridge, path: Path, overwrite: bool = False) -> None:
    """Writes a ``.pt`` file as upstream does.

    Raises:
        CartridgeFormatError: the name does not end in ``.pt``, by which readers know it.
        FileExistsError: it is there and ``overwrite`` is false.
    """
    if path.suffix != ".pt":
        raise CartridgeFormatError(f"{path} is no name for a .pt file; fix: end it in .pt")
    data = {
        name: [tensor.detach() for tensor in tensors]
        for name, tensors in cartridge.snapshot.parts.items()
    }
    for ours, theirs in zip(*_SPELLINGS, strict=True):
        data[theirs] = data[ours]  # the same list: stored once
    replace_file(path, lambda scratch: torch.save(data, scratch), overwrite)


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def _unpickle(path: Path, mapped: bool) -> Any:
    with reading_disk(path):
        if pointer_in(path) is not None:
            raise CartridgeFormatError(about(path))
        with path.open("rb") as file:
            return _unpickle_from(file, path, mapped)


def _unpickle_from(file: BinaryIO, path: Path, mapped: bool) -> Any:
    try:
        with reading_disk(path):
            # Files of torch before 1.6 are no zip, and cannot be mapped.
            is_zip = zipfile.is_zipfile(file)
            if is_zip:
                check_archive(file, path)
            mapped = mapped and is_zip
            if mapped:
                fetch_from_disk(file)
            file.seek(0)
            source = str(path) if mapped else file
            with torch.serialization.safe_globals([nn.ParameterList, nn.Parameter]):
                return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except (CartridgeFormatError, DiskFailed):
        raise
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
