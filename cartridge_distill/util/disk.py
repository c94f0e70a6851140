"""A disk that is full, or fails, said as such.

The system says it with an error number, torch's writer with a line of its own C++ code, those of
safetensors and Parquet in brackets. What is replaced whole (``files``) is written within
:func:`named_disk`, and so is whatever else is large.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
_NUMBER_IN_WORDS = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)


class DiskFull(CartridgeDistillError, OSError):
    """A disk has no room for what is written. Behind HTTP it is status 507."""


class DiskFailed(CartridgeDistillError, OSError):
    """A disk cannot be written to: read-only, broken, or not ours. Behind HTTP it is status 507."""


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
