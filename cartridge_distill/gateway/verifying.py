"""Are the files of a version those that were uploaded? Asked at start, and of files that changed.

``version.json`` holds the SHA-256 of the tensors, as the upload was checked against it. Between two
lives of a gateway a disk may change a bit, and somebody may change a file; the server would load
that under an id that stands for something else. Nothing is deleted here, and nothing is repaired.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path

from cartridge_distill.cartridge.content_hash import sha256_of
from cartridge_distill.cartridge.formats import tokasaurus
from cartridge_distill.gateway.refusals import Problem
from cartridge_distill.sync.upload import UploadHeader
from cartridge_distill.util.disk import DiskFailed, reading_disk
from cartridge_distill.util.errors import CartridgeFormatError

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 5.0
Signature = tuple[tuple[int, int, int], ...]


def check_files(folder: Path, header: UploadHeader) -> None:
    """Reads all of a version's weights, and compares them with what was uploaded.

    Raises:
        CartridgeFormatError: they are others; with the first difference.
        DiskFailed: the disk does not give them.
    """
    try:
        with reading_disk(folder):
            stored = tokasaurus.read(folder)
    except DiskFailed:
        raise
    except OSError as error:
        raise CartridgeFormatError(f"it cannot be read: {error}") from error
    found = {**stored.shape(), "dtype": stored.dtype_name(), "base_model": stored.meta.base_model}
    for name, value in found.items():
        said = getattr(header, name)
        said = list(said) if isinstance(said, tuple) else said
        if value != said:
            raise CartridgeFormatError(f"its files have {name}={value}, uploaded was {said}")
    if (digest := sha256_of(tensor for _, tensor in stored.snapshot.items())) != header.sha256:
        raise CartridgeFormatError(
            "the tensors on the disk are not those that were uploaded: they have SHA-256 "
            f"{digest}, and {header.sha256} was uploaded"
        )


def problem_of(folder: Path, header: UploadHeader) -> Problem | None:
    """What is wrong with a version; None where it is as it was uploaded."""
    try:
        check_files(folder, header)
    except (CartridgeFormatError, DiskFailed) as error:
        return error
    except Exception as error:  # a damaged file can fail in any way there is
        logger.exception("%s cannot be checked", folder)
        return CartridgeFormatError(f"it cannot be checked: {type(error).__name__}: {error}")
    return None


def problems(versions: Iterable[tuple[str, Path, UploadHeader]]) -> dict[str, Problem]:
    """Looks at many versions, and says how far it is.

    Args:
        versions: id, folder and description of each.

    Returns:
        What is wrong, by id.
    """
    wanted = list(versions)
    total = sum(header.data_bytes for _, _, header in wanted)
    done, next_word = 0, time.monotonic() + _REPORT_SECONDS
    found = {}
    for number, (version_id, folder, header) in enumerate(wanted):
        if time.monotonic() >= next_word:
            logger.info(
                "checking the versions on the disk: %d of %d, %.1f of %.1f GB",
                *(number, len(wanted), done / 1e9, total / 1e9),
            )
            next_word = time.monotonic() + _REPORT_SECONDS
        if (problem := problem_of(folder, header)) is not None:
            found[version_id] = problem
        done += header.data_bytes
    return found


def signature(folder: Path) -> Signature | None:
    """What is another when a file was written to, or replaced; None where one is missing."""
    try:
        stats = [(folder / name).stat() for name in tokasaurus.FILES]
    except OSError:
        return None
    return tuple((found.st_ino, found.st_size, found.st_ctime_ns) for found in stats)
