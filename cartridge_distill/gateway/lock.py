"""One gateway a cartridge directory.

A gateway deletes what it finds half-written, and keeps in memory what each id stands for. Two of
them on one directory would delete each other's uploads, and give one id two contents.

The lock is on the directory itself, so nothing lies in it that the server might take for a
cartridge. It ends with the process that holds it, also when that is killed.
"""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from cartridge_distill.util.errors import ConfigError

logger = logging.getLogger(__name__)


class DirectoryLock:
    """Holds a directory from its making until :meth:`release`.

    Raises:
        ConfigError: another process holds it, or it cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._handle: int | None = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise ConfigError(
                f"cartridge_dir {directory}: {error.strerror}; fix: name a folder that can be "
                "written to"
            ) from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ConfigError(
                f"another gateway serves the cartridge directory {directory}; fix: end it, or give "
                "this one a --cartridge-dir of its own"
            ) from None
        except OSError as error:
            # Some network file systems lock no directories. Refusing to serve would help nobody.
            logger.warning(
                "%s cannot be locked (%s): see to it that no other gateway serves it",
                directory,
                error.strerror,
            )

    def release(self) -> None:
        """Lets another process have the directory."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
