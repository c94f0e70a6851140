"""Of a ``.pt`` file: what is stored is what was written, and no tensor is larger than that.

A pickled tensor says its shape and strides itself. With a stride of 0 one stored number is a tensor
of any size, many tensors may share one storage, and a zip may be compressed. None of that costs
anything until somebody copies the tensors, so it is looked at before: a small file must not become
gigabytes.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from cartridge_distill.util.errors import CartridgeFormatError

_PIECE_BYTES = 2**20
_FOLDER = 0x10  # of a record's attributes, as DOS has them


def check_archive(file: BinaryIO, path: Path, with_checksums: bool = False) -> None:
    """A ``.pt`` file as ``torch.save`` writes it: nothing compressed, nothing changed since.

    What is compressed can be of any size. Each record of the zip has a CRC-32, which ``torch.load``
    never looks at. A checksum of 0 is none: torch can be told to write none, and that is done where
    tensors are published.

    Args:
        with_checksums: each record must have one.

    Raises:
        CartridgeFormatError: a record is compressed, claims more bytes than the file has or than
            are stored, claims to be a folder, or has other bytes than those that were written.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size > size:
                raise CartridgeFormatError(
                    f"{path}: {record.filename!r:.60} is compressed, and would be "
                    f"{record.file_size} bytes of a file of {size}; torch.save compresses nothing"
                )
            # torch's reader takes it for read, and leaves what lay in memory in its place.
            folder = record.is_dir() or record.external_attr & _FOLDER
            if (folder and record.file_size) or record.compress_size != record.file_size:
                raise CartridgeFormatError(
                    f"{path}: {record.filename!r:.60} says that it is a folder, or that it has "
                    f"{record.compress_size} of its {record.file_size} bytes; fix: take another "
                    "copy of the file"
                )
            if with_checksums and record.file_size and not record.CRC:
                raise CartridgeFormatError(
                    f"{path}: {record.filename!r:.60} has no checksum; torch.save writes one"
                )
            _check_record(archive, record, path)


def _check_record(archive: zipfile.ZipFile, record: zipfile.ZipInfo, path: Path) -> None:
    """Its name stands where its bytes are, and they have its checksum, where it has one."""
    try:
        with archive.open(record) as stream:
            # At the end the reader compares the checksum.
            while record.CRC and stream.read(_PIECE_BYTES):
                pass
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        # What zipfile makes of a changed byte: an unknown method, a password that is asked for.
        raise CartridgeFormatError(
            f"{path}: {record.filename!r:.60} is not as it was written: {error}; fix: take another "
            "copy of the file"
        ) from error


def check_stored(tensors: Iterable[Tensor], part: str, path: Path) -> None:
    """Ordinary tensors, each with a stored number of its own for each of its elements.

    Args:
        tensors: of one part of a cartridge, a layer each. (Two parts may be the same tensors.)
        part: what they are called.

    Raises:
        CartridgeFormatError: one is sparse, nested, quantized or without data, or they hold more
            than their storages, or than the file.
    """
    size, wanted = path.stat().st_size, 0
    for layer, tensor in enumerate(tensors):
        name = f"{part}.{layer}"
        if (
            type(tensor) not in (Tensor, nn.Parameter)
            or tensor.layout != torch.strided
            or tensor.is_nested
            or tensor.is_quantized
            or tensor.device.type != "cpu"
        ):
            kind = f"{type(tensor).__name__} on {tensor.device}, {tensor.layout}"
            raise CartridgeFormatError(f"{path}: {name} is no plain tensor ({kind})")
        own = tensor.numel() * tensor.element_size()
        held = tensor.untyped_storage().nbytes()
        if own > held:
            raise CartridgeFormatError(
                f"{path}: {name} would be {own} bytes, and {held} are stored of it: its numbers "
                "repeat each other (a stride of 0), or are not there"
            )
        wanted += own
    if wanted > size:
        raise CartridgeFormatError(
            f"{path}: {part} would be {wanted} bytes, and the file has {size}: its layers share "
            "what is stored"
        )
