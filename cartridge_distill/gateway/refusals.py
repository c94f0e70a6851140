"""Versions that lie on the disk and are not served, each with its reason.

Their files are not those that were uploaded, or the disk does not give them. They stay as they are,
for a person to look at. What the disk did not give may be there again when the disk is right: that
is HTTP 507, and what is another is as good as not there (404; 409 for an upload under its id).
"""

from __future__ import annotations

import logging
from pathlib import Path

from cartridge_distill.gateway.version_info import Conflict, Unknown
from cartridge_distill.util.disk import DiskFailed
from cartridge_distill.util.errors import CartridgeFormatError

logger = logging.getLogger(__name__)

Problem = CartridgeFormatError | DiskFailed
"""Why a version is not served."""


class Refusals:
    """The reasons, by the names of the folders."""

    def __init__(self) -> None:
        self._reasons: dict[str, Problem] = {}

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, folder: Path, reason: Problem) -> None:
        """From here on what lies in ``folder`` is not served."""
        self._reasons[folder.name] = reason
        logger.error("%s is not served, and left as it is: %s", folder, reason)

    def check_served(self, version_id: str, folder: Path) -> None:
        """For a request.

        Raises:
            Unknown: it is not what was uploaded.
            DiskFailed: the disk did not give it.
        """
        if (reason := self._of(version_id, folder)) is not None:
            raise Unknown(
                f"cartridge {version_id!r} is on the disk and is not served: {reason}. Upload it "
                "under a new id; whoever runs the gateway may look at its folder, and delete it"
            )

    def check_free(self, version_id: str, folder: Path) -> None:
        """For an upload.

        Raises:
            Conflict: what lies there is another.
            DiskFailed: the disk did not give what lies there.
        """
        if (reason := self._of(version_id, folder)) is not None:
            raise Conflict(
                f"cartridge {version_id!r} is on the disk and is not served: {reason}. Use a new id"
            )

    def _of(self, version_id: str, folder: Path) -> Problem | None:
        reason = self._reasons.get(folder.name)
        if isinstance(reason, DiskFailed):
            raise DiskFailed(
                f"cartridge {version_id!r} is on the disk and is not served: {reason}. When the "
                "disk is right again, start the gateway anew; a new id can be uploaded meanwhile"
            )
        return reason
