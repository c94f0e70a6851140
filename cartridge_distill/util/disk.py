"""A disk that is full, said as such.

The system says it with an error number, torch's writer with a line of its own C++ code, that of
safetensors in brackets. What is replaced whole (``files``) is written within :func:`named_disk`,
and so is whatever else is large.
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
# What torch's writer calls itself in its errors, which have no error number.
_TORCH_WRITER = ("inline_container", "PytorchStreamWriter")
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


class DiskFull(CartridgeDistillError, OSError):
    """A disk has no room for what is written. Behind HTTP it is status 507."""


@contextmanager
def named_disk(folder: Path) -> Iterator[None]:
    """What is written within fails with the disk's name when the disk is full.

    Args:
        folder: on the disk that is written to.

    Raises:
        DiskFull: naming the folder and what is free there.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        raise _full(folder, reason) from error


def _reason(error: Exception) -> str | None:
    """Why there was no room, in words; None for an error of another kind."""
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in _FULL else None
    if found := _RUST_ERROR.search(str(error)):
        number = int(found[1])
        return os.strerror(number) if number in _FULL else None
    # torch's writer fails over nothing but the disk.
    if isinstance(error, RuntimeError) and any(name in str(error) for name in _TORCH_WRITER):
        return "torch could not write its file"
    return None


def _full(folder: Path, reason: str) -> DiskFull:
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free"
    except OSError:
        free = "how much is free cannot be told"
    return DiskFull(
        f"the disk of {folder} does not take what is written ({reason}; {free}): make room there, "
        "or name a folder on another disk"
    )
