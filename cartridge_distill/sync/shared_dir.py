"""Sync: a new cartridge reaches the server before the next rollout.

Transports implement :class:`CartridgePublisher`. Here is the one for a directory that trainer and
server share; the one over HTTP, to a gateway, is in ``http_sync``.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from cartridge_distill.cartridge.formats.tokasaurus import write_snapshot
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.sync.versions import run_of, step_of
from cartridge_distill.util.errors import ConfigError, SyncError, with_fix


class CartridgePublisher(Protocol):
    """Puts versions where the servers find them. Blocks; training runs it in a thread."""

    def publish(self, version: str, snapshot: Snapshot) -> None:
        """Makes a version available; on return every server may be asked for it."""

    def retire(self, keep: int) -> list[str]:
        """Deletes all but the newest ``keep`` versions published here; returns what went."""

    def delete_runs(self, runs: Collection[str]) -> list[str]:
        """Deletes every version of these runs, whoever published it; returns what went.

        For what a run that died has left; a version that cannot be deleted now stays.
        """


def oldest(published: list[str], keep: int) -> list[str]:
    """All but the newest ``keep`` versions.

    Raises:
        ConfigError: ``keep`` below 1.
    """
    if keep < 1:
        raise ConfigError(
            f"sync_keep={keep}: the served version itself must stay; fix: give 1 or more"
        )
    return published[:-keep]


class SharedDirectoryPublisher:
    """Writes versions into the directory that the server reads (its ``cartridge_dir``).

    Args:
        directory: shared with the server.
        base_model: recorded in ``config.yaml``.
    """

    def __init__(self, directory: str | Path, base_model: str) -> None:
        self.directory = Path(directory)
        self.base_model = base_model
        self._published: list[str] = []
        self.directory.mkdir(parents=True, exist_ok=True)

    def publish(self, version: str, snapshot: Snapshot) -> None:
        """Atomic: the directory of a version is whole or absent.

        Raises:
            SyncError: the id is malformed, taken, or the directory cannot be written.
        """
        step_of(version)
        try:
            write_snapshot(snapshot, self.directory / version, self.base_model)
        except FileExistsError as error:
            raise SyncError(f"version {version} was published before: {error}") from error
        except OSError as error:
            raise SyncError(
                with_fix(
                    f"version {version} cannot be written: {error}", "let sync_dir be written to"
                )
            ) from error
        self._published.append(version)

    def retire(self, keep: int) -> list[str]:
        """As :meth:`CartridgePublisher.retire`.

        Raises:
            ConfigError: ``keep`` below 1.
        """
        gone = oldest(self._published, keep)
        for version in gone:
            shutil.rmtree(self.directory / version)
        self._published = self._published[len(gone) :]
        return gone

    def delete_runs(self, runs: Collection[str]) -> list[str]:
        """As :meth:`CartridgePublisher.delete_runs`, half-written directories too."""
        gone = []
        for folder in sorted(self.directory.iterdir()):
            # A write that was killed leaves ".<version>.<random>".
            version = folder.name.removeprefix(".").partition(".")[0]
            if folder.is_dir() and run_of(version) in runs:
                shutil.rmtree(folder)
                gone.append(folder.name)
        return gone
