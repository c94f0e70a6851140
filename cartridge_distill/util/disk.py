"""A disk that is full, or fails, said as such.

The system says it with an error number, torch's writer with a line of its own C++ code, those of
safetensors and Parquet in brackets. What is replaced whole (``files``) is written within
:func:`named_disk`, and so is whatever else is large. What a server reads for a client is read
within :func:`reading_disk`: a disk that fails is no fault of the file, or of who asks for it.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cartridge_distill.util.errors import CartridgeDistillError

# Full; a quota is reached; a file may not be so large.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Broken; read-only; not ours to write; a network's disk that is gone.
_FAILED = (
    *(errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENXIO, errno.ENODEV),
    *(errno.EREMOTEIO, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT),
)
# What torch's writer calls itself in its errors, which have no error number.
_TORCH_WRITER = ("inline_container", "PytorchStreamWriter")
_PIECE_BYTES = 2**20
_POPULATE_READ = 22  # MADV_POPULATE_READ of linux/mman.h
_NUMBER_IN_WORDS = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)


class DiskFull(CartridgeDistillError, OSError):
    """A disk has no room for what is written. Behind HTTP it is status 507."""


class DiskFailed(CartridgeDistillError, OSError):
    """A disk cannot be written to, or read: read-only, broken, not ours. Over HTTP: status 507."""


@contextmanager
def named_disk(folder: Path, whatever: bool = False) -> Iterator[None]:
    """What is written within fails with the disk's name when the disk is full, or fails.

    Args:
        folder: on the disk that is written to.
        whatever: every error of the system counts as one of the disk (a folder that is gone, no
            more file descriptors): for a server, which must not fail over it without words.

    Raises:
        DiskFull: naming the folder and what is free there.
        DiskFailed: naming the folder and the system's reason.
    """
    try:
        yield
    except (DiskFull, DiskFailed):
        raise
    except Exception as error:
        number = _number(error)
        if number in _FULL:
            raise _full(folder, os.strerror(number)) from error
        # torch's writer fails over nothing but the disk.
        if isinstance(error, RuntimeError) and any(name in str(error) for name in _TORCH_WRITER):
            raise _full(folder, "torch could not write its file") from error
        if number in _FAILED or (whatever and isinstance(error, OSError)):
            raise _failed(folder, error if number is None else os.strerror(number)) from error
        raise


@contextmanager
def reading_disk(path: Path) -> Iterator[None]:
    """What is read within fails with the file's name when its disk fails.

    Any other error is passed on: a file that is not there, or damaged.

    Raises:
        DiskFailed: naming the file and the system's reason.
    """
    try:
        yield
    except CartridgeDistillError:
        raise  # it quotes the file, whose words are not the system's
    except Exception as error:
        number = _number(error)
        if number not in _FAILED:
            raise
        assert number is not None
        raise DiskFailed(
            f"{path} cannot be read ({os.strerror(number)}): see to its disk (does it fail, is it "
            "still there, whose is the file?)"
        ) from error


def fetch_from_disk(file: BinaryIO) -> None:
    """Has a file that will be mapped read into memory now, where the disk can say that it fails.

    Later, in the middle of a computation, the kernel would end the process instead (SIGBUS).

    Raises:
        OSError: EIO, the disk does not give it.
    """
    if os.fstat(file.fileno()).st_size == 0:
        return
    # Other threads go on while it is read; they would not during ``madvise``.
    for start in range(0, os.fstat(file.fileno()).st_size, _PIECE_BYTES):
        os.pread(file.fileno(), _PIECE_BYTES, start)
    with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        try:
            mapped.madvise(_POPULATE_READ)
        except OSError as error:
            if error.errno == errno.EFAULT:
                raise OSError(errno.EIO, os.strerror(errno.EIO), file.name) from error
            # A kernel before 5.14 does not know how; then it is as it was.


def _number(error: Exception) -> int | None:
    """The system's number of an error, which some libraries have in their words alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _NUMBER_IN_WORDS.search(str(error))
    return int(found[1] or found[2]) if found else None


def _failed(folder: Path, reason: object) -> DiskFailed:
    return DiskFailed(
        f"{folder} cannot be written to ({reason}): see to its disk (is it mounted read-only, does "
        "it fail, whose is the folder?), or name a folder on another one"
    )


def _full(folder: Path, reason: str) -> DiskFull:
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free"
    except OSError:
        free = "how much is free cannot be told"
    return DiskFull(
        f"the disk of {folder} does not take what is written ({reason}; {free}): make room there, "
        "or name a folder on another disk"
    )
