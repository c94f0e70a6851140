"""SHA-256 of tensors that are saved, written beside them and compared when they are read again.

A disk, a copy or a network that changes one bit gives another cartridge, and nothing else would
tell: any number is a number. The hash (:data:`TENSORS`) stands in the JSON of our own files, and
the JSON has a hash of its own entries (:mod:`cartridge_distill.util.sealed`).

They find accidents, and files that are not of one save. They are no signature: whoever can change
the tensors can change the hash. Files of earlier versions have none; they are read with a warning.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.sealed import ENTRIES, BrokenSeal, unsealed

logger = logging.getLogger(__name__)

TENSORS = "tensors_sha256"
HASHES = (TENSORS, ENTRIES)


def sha256_of(tensors: Iterable[Tensor]) -> str:
    """Of the tensors' bytes, one after the other, on whatever device they are.

    Names, shapes and dtypes are no part of it: what describes the tensors has them.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def sha256_of_named(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """Copies nothing of a contiguous tensor on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def check_hashes(found: str, described: Mapping[str, Any], weights: Path, file: Path) -> None:
    """Compares what was read with the hashes that were written.

    Args:
        found: SHA-256 of the tensors.
        described: the JSON's entries, with or without hashes.
        weights: the tensors' file, for the message.
        file: the JSON's, for the message.

    Raises:
        CartridgeFormatError: the tensors or the entries are others.
    """
    if TENSORS not in described:
        logger.warning(
            "%s has no %s, as files of earlier versions: nobody can tell whether %s holds the "
            "tensors that were written",
            *(file, TENSORS, weights.name),
        )
    elif found != described[TENSORS]:
        raise CartridgeFormatError(
            f"{weights}: the tensors are not those that were written: SHA-256 {found}, and "
            f"{file.name} says {described[TENSORS]!r:.80}. A part of the file was changed, or the "
            "two files are not of one save; fix: take another copy of both"
        )
    elif ENTRIES not in described:
        logger.warning(
            "%s has no %s: nobody can tell whether its entries are those that were written",
            *(file, ENTRIES),
        )
    check_entries(described, file)


def check_entries(described: Mapping[str, Any], file: Path) -> None:
    """Compares a JSON's entries with the hash among them, where there is one.

    Raises:
        CartridgeFormatError: they are others.
    """
    try:
        unsealed(described)
    except BrokenSeal as error:
        raise CartridgeFormatError(
            f"{file}: {error}; fix: take another copy of it; if you have changed it by hand, take "
            f"the entry {ENTRIES} out"
        ) from None
