"""Cartridges on disk and on the Hub: the one door to all formats.

The formats are in :mod:`cartridge_distill.cartridge.formats`, the Hub in
:mod:`cartridge_distill.cartridge.hub`. Here they meet the trainable cartridge, which is float32
whatever a file holds; :func:`convert` goes from file to file and keeps the dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cartridge_distill.cartridge.formats import hazyresearch, native
from cartridge_distill.cartridge.formats.detect import FORMATS, Format, read_local, write_local
from cartridge_distill.cartridge.formats.native import META_FILE, WEIGHTS_FILE
from cartridge_distill.cartridge.formats.stored_cartridge import (
    DTYPES,
    CartridgeMeta,
    StoredCartridge,
)
from cartridge_distill.cartridge.formats.tokasaurus import write_snapshot
from cartridge_distill.cartridge.hub import pull
from cartridge_distill.cartridge.hub_id import is_hub_id
from cartridge_distill.cartridge.kv_shape import check_fits
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.util.errors import CartridgeFormatError, ConfigError, with_fix

__all__ = [
    "FORMATS",
    "META_FILE",
    "WEIGHTS_FILE",
    "CartridgeMeta",
    "Format",
    "StoredCartridge",
    "convert",
    "load_cartridge",
    "load_pt",
    "load_pt_prefix",
    "read_cartridge",
    "read_meta",
    "record",
    "save_cartridge",
    "write_cartridge",
    "write_tokasaurus",
]


def load_cartridge(source: str | Path, model_config: Any | None = None) -> TrainableCache:
    """Reads a cartridge for training or use; see :func:`read_cartridge` for what ``source`` can be.

    Args:
        model_config: transformers config of the model it is meant for; when given, the cartridge
            must fit.

    Raises:
        CartridgeFormatError: nothing readable is there, or it does not fit: with the number that
            differs.
    """
    snapshot = read_cartridge(source, model_config).snapshot
    return TrainableCache.from_snapshot(snapshot)


def read_cartridge(source: str | Path, model_config: Any | None = None) -> StoredCartridge:
    """Reads a cartridge as it is stored: its dtype, and what it says about itself.

    Args:
        source: a file or directory of any format, or a hub id ``owner/name``, ``@revision`` after
            it to pin one. A directory that is there goes before a hub id of the same name.
        model_config: as in :func:`load_cartridge`.

    Raises:
        CartridgeFormatError: nothing readable is there, or it does not fit.
        HubError: the Hub does not give it.
    """
    path = Path(source).expanduser()
    if not path.exists() and is_hub_id(str(source)):
        path = pull(str(source))
    elif not path.exists():
        raise CartridgeFormatError(
            f"{source} is no file, no directory and no hub id (owner/name); fix: name the folder "
            "of a run or of a cartridge, or give a hub id"
        )
    cartridge = read_local(path)
    if model_config is not None:
        try:
            check_fits(cartridge.snapshot.kv_shape, model_config)
        except CartridgeFormatError as error:
            raise CartridgeFormatError(
                with_fix(f"{source}: {error}", "give the model that it was made for")
            ) from None
    return cartridge


def write_cartridge(
    cartridge: StoredCartridge, target: str | Path, format: Format, overwrite: bool = False
) -> Path:
    """Writes a cartridge in one format, whole or not at all, in the dtype it has.

    Raises:
        CartridgeFormatError: the format cannot hold it (the reason says why).
        FileExistsError: the target is there and ``overwrite`` is false.
    """
    write_local(cartridge, Path(target), format, overwrite)
    return Path(target)


def convert(
    source: str | Path,
    target: str | Path,
    format: Format,
    *,
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Reads any format and writes another.

    Args:
        source: as in :func:`read_cartridge`.
        target: a directory; for ``hazyresearch`` a file that ends in ``.pt``.
        base_model: the model it is for, where the source does not say or says otherwise.
        dtype: float32, bfloat16 or float16; as stored by default, which keeps every bit.

    Raises:
        CartridgeFormatError: the source cannot be read, or the format cannot hold it.
        ConfigError: a dtype that no format has.
        FileExistsError: the target is there and ``overwrite`` is false.
    """
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype={dtype} is in no format; fix: give float32, bfloat16 or float16")
    cartridge = read_cartridge(source).for_model(base_model)
    if dtype is not None:
        cartridge = cartridge.to(dtype)
    return write_cartridge(cartridge, target, format, overwrite)


def save_cartridge(cartridge: TrainableCache, directory: str | Path, meta: CartridgeMeta) -> Path:
    """Writes the native format in float32; what is there is replaced."""
    snapshot = Snapshot.take(cartridge.state_dict(), torch.float32)
    native.write(StoredCartridge(snapshot, meta), Path(directory), overwrite=True)
    return Path(directory)


def read_meta(directory: str | Path) -> dict[str, Any]:
    """The JSON beside a cartridge in the native format."""
    return native.read_json(Path(directory))


def record(
    directory: str | Path,
    *,
    recipe: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Adds settings or figures to a cartridge in the native format, entry by entry.

    Raises:
        CartridgeFormatError: it is no directory of that format, the only one that holds them.
    """
    path = Path(directory)
    if not (path / META_FILE).is_file():
        raise CartridgeFormatError(
            f"{directory} is no directory in the native format, the only one that holds them; "
            "fix: `cartridge-distill convert SOURCE TARGET --to native` makes one"
        )
    native.record(path, recipe or {}, metrics or {})


def write_tokasaurus(
    cartridge: TrainableCache,
    directory: str | Path,
    base_model: str,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes what a Tokasaurus server reads for ``source: "local"``, in the dtype it serves.

    Raises:
        FileExistsError: the directory is there; the server never loads an id twice.
    """
    snapshot = Snapshot.take(cartridge.state_dict(), dtype)
    return write_snapshot(snapshot, directory, base_model)


def load_pt(path: str | Path) -> TrainableCache:
    """Reads a ``.pt`` file of either spelling without running pickled code.

    Raises:
        CartridgeFormatError: not such a file, or one that holds other objects than tensors.
    """
    return TrainableCache.from_snapshot(hazyresearch.read(Path(path)).snapshot)


def load_pt_prefix(path: str | Path) -> Prefix:
    """A ``.pt`` file to serve: the prefix in the file's dtype.

    Nothing is trained there, so no float32 master weights are made.

    Raises:
        CartridgeFormatError: as :func:`load_pt`.
    """
    return Prefix(*hazyresearch.read(Path(path), mapped=True).snapshot.layers())  # copies
