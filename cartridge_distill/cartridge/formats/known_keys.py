"""What a cartridge file may hold: a key that is not known here is refused by its name.

Forks of the public code write more than keys and values: how many tokens of each layer are valid, a
weight for each token. Read without them, such a file is another cartridge: padding is attended to.
Nobody can tell from its name what a key means, so none is left out silently.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.lfs import about, pointer_in

_SHOWN = 6
_METADATA = ("format",)  # "pt", which safetensors' users write and nobody reads


def refuse_unknown(found: Iterable[object], known: Collection[str], where: str) -> None:
    """Compares the keys of a file with those that are understood.

    Args:
        found: the file's keys, of whatever type they are.
        where: the file, or the part of it, for the message.

    Raises:
        CartridgeFormatError: naming the keys that are not known.
    """
    strange = sorted({str(key)[:60] for key in found} - set(known))
    if strange:
        more = ", ..." if len(strange) > _SHOWN else ""
        raise CartridgeFormatError(
            f"{where} has keys that are not known here: {', '.join(strange[:_SHOWN])}{more}. They "
            "may change what the keys and values mean (how many tokens of a layer are valid, for "
            "instance), so they are not left out silently; fix: save the cartridge without them, "
            "with the code that wrote it"
        )


def read_safetensors(path: Path, known: Collection[str] = ()) -> dict[str, Tensor]:
    """All tensors of a file.

    Args:
        known: entries of its metadata that the caller reads with :func:`metadata_of`.

    Raises:
        CartridgeFormatError: it cannot be read, or its metadata says things that are not known.
    """
    if pointer_in(path) is not None:
        raise CartridgeFormatError(about(path))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CartridgeFormatError(f"{path} cannot be read: {error}") from error
    refuse_unknown(metadata, (*_METADATA, *known), f"{path}, its metadata")
    return tensors


def metadata_of(path: Path) -> dict[str, str]:
    """What a file that could be read says beside its tensors."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}
