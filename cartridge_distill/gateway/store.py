"""The versions on disk: immutable, counted while in use, kept within a bound.

One directory per version, as the server reads it, with ``version.json`` beside the two files. A
directory without that file was not put there by a gateway and is not served: nobody checked it.
One whose files are not those that were uploaded is not served either (``verifying``): it stays as
it is, for a person to look at.

Versions of a run (``<run>-step-000012``) are kept to the newest few, and the oldest unused ones go
when the disk bound asks for it. An id of any other form was put there by hand, and stays until it
is deleted by hand.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cartridge_distill.cartridge.formats.tokasaurus import write_config
from cartridge_distill.gateway.metrics import Metrics
from cartridge_distill.gateway.refusals import Refusals
from cartridge_distill.gateway.verifying import (
    Signature,
    problems,
    signature,
)
from cartridge_distill.gateway.version_info import (
    VERSION_FILE,
    Conflict,
    NoRoom,
    Unknown,
    VersionInfo,
    read_info,
    write_info,
)
from cartridge_distill.rollout.protocol import sanitise_cartridge_id
from cartridge_distill.sync.upload import UploadHeader
from cartridge_distill.sync.versions import run_of
from cartridge_distill.util.disk import DiskFailed, named_disk, reading_disk
from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.files import move_into_place

logger = logging.getLogger(__name__)

STAGING = ".staging"
RETRY_SECONDS = 60.0
"""A version outlives a request that failed by this, longer than a client's pauses."""


@dataclass
class _Version:
    info: VersionInfo
    signature: Signature | None  # of its files, when they were known to be right
    in_use: int = 0
    asked_again_until: float = 0.0  # monotonic; a request for it failed, and its client tries again


class VersionStore:
    """The cartridge directory of one server.

    Its methods are called from one thread; what takes long (flushing) is in :meth:`place`, which
    touches no state and may run in another.

    Args:
        directory: only this store writes into it.
        keep: newest versions kept of each run.
        max_bytes: bound on all versions.
    """

    def __init__(self, directory: Path, keep: int, max_bytes: int, metrics: Metrics) -> None:
        self.directory = directory
        self._keep = keep
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._versions: dict[str, _Version] = {}  # in order of their arrival
        # What each id stands for while this gateway lives, also when it is gone, or never worked:
        # the server may hold it still.
        self._content: dict[str, str] = {}
        self._refused = Refusals()

    def open(self) -> None:
        """Reads what an earlier gateway left; what it left half-written goes.

        What the versions hold is not looked at: see :meth:`check`.

        Raises:
            DiskFailed: the directory cannot be read or written.
        """
        with named_disk(self.directory, whatever=True):
            self.directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.directory / STAGING, ignore_errors=True)
            (self.directory / STAGING).mkdir(exist_ok=True)
            found = self._read()
        for info in sorted(found, key=lambda info: info.created_at):
            self._remember(info)
        self._count()

    def _read(self) -> list[VersionInfo]:
        found = []
        for folder in sorted(self.directory.iterdir()):
            if folder.name == STAGING or not folder.is_dir():
                continue
            if folder.name.startswith("."):
                shutil.rmtree(folder)
                continue
            try:
                with reading_disk(folder / VERSION_FILE):
                    info = read_info(folder)
            except FileNotFoundError:
                logger.warning("%s was not put there by a gateway and is not served", folder)
            except (CartridgeFormatError, DiskFailed) as error:
                self._refused.add(folder, error)
            except OSError as error:
                self._refused.add(folder, CartridgeFormatError(str(error)))
            else:
                found.append(info)
        return found

    # --- are they what was uploaded? ----------------------------------------------------------

    async def check(self, only_changed: bool = False) -> None:
        """Compares versions with what was uploaded; those that are others are served no more.

        Args:
            only_changed: only those whose files were written to, or replaced, since they were known
                to be right. That costs a look at each file's date.
        """
        wanted = [
            version
            for name, version in self._versions.items()
            if not only_changed
            or version.signature is None
            or version.signature != signature(self.folder(name))
        ]
        looked = {version.info.id: signature(self.folder(version.info.id)) for version in wanted}
        asked = [(v.info.id, self.folder(v.info.id), v.info.header) for v in wanted]
        found = await asyncio.to_thread(problems, asked) if asked else {}
        for version in wanted:
            version_id = version.info.id
            if self._versions.get(version_id) is not version:
                continue  # deleted meanwhile
            if version_id in found:
                del self._versions[version_id]
                self._refused.add(self.folder(version_id), found[version_id])
            else:
                version.signature = looked[version_id]
        self._count()

    def check_served(self, version_id: str) -> None:
        """Refuses an id whose folder is here and is not served.

        Raises:
            Unknown: with the reason.
            DiskFailed: the disk did not give it.
        """
        try:
            folder = self.folder(version_id)
        except ValueError:
            return  # nothing can lie under such an id
        self._refused.check_served(version_id, folder)

    # --- what is there ------------------------------------------------------------------------

    @property
    def infos(self) -> list[VersionInfo]:
        """All versions, the oldest first."""
        return [version.info for version in self._versions.values()]

    @property
    def num_bytes(self) -> int:
        return sum(version.info.num_bytes for version in self._versions.values())

    def info(self, version_id: str) -> VersionInfo:
        """One version.

        Raises:
            Unknown: with the ids that are there.
            DiskFailed: it is there, and the disk did not give it.
        """
        version = self._versions.get(version_id)
        if version is None:
            self.check_served(version_id)
            there = list(self._versions)
            shown = ", ".join(there[-10:]) or "none"
            more = f" and {len(there) - 10} older ones" if len(there) > 10 else ""
            raise Unknown(
                f"cartridge {version_id!r} is not here; here are: {shown}{more}. Upload it with "
                "PUT /cartridges/{id}"
            )
        return version.info

    @contextmanager
    def using(self, ids: Sequence[str]) -> Iterator[None]:
        """Holds versions while a request needs them, and a while longer when it fails.

        A version of a run that was only kept because it was in use would else be gone when the
        client comes back with what was a 503.

        Raises:
            Unknown: one is not there.
        """
        for version_id in ids:
            self.info(version_id)
        held = [self._versions[version_id] for version_id in ids]
        for version in held:
            version.in_use += 1
        try:
            yield
        except Exception:  # whatever it was: it is raised again, and the client comes back
            for version in held:
                version.asked_again_until = time.monotonic() + RETRY_SECONDS
            raise
        finally:
            for version in held:
                version.in_use -= 1

    # --- what comes ---------------------------------------------------------------------------

    def staging_folder(self) -> Path:
        """A new empty folder, on the disk where versions lie.

        Raises:
            DiskFull: there is no room for it.
            DiskFailed: it cannot be written.
        """
        with named_disk(self.directory, whatever=True):
            return Path(tempfile.mkdtemp(dir=self.directory / STAGING))

    def folder(self, version_id: str) -> Path:
        """Where the server looks for an id."""
        return self.directory / sanitise_cartridge_id(version_id)

    def check_new(self, version_id: str, header: UploadHeader) -> bool:
        """Is this id free for this content?

        Returns:
            True when it is new, False when exactly this is there already.

        Args:
            header: from :func:`~.receiving.receive`: its SHA-256 is of the tensors by name.

        Raises:
            Conflict: the id stands, or stood, for another content; or another id has the same
                directory.
            DiskFailed: the id's version is there, and the disk did not give it.
        """
        stood_for = self._content.get(version_id)
        if stood_for is not None and stood_for != header.model_dump_json():
            raise Conflict(
                f"cartridge {version_id!r} is or was here with another content; versions never "
                "change, use a new id"
            )
        if version_id in self._versions:
            return False
        self._refused.check_free(version_id, self.folder(version_id))
        if self.folder(version_id).exists():
            raise Conflict(
                f"the directory {self.folder(version_id).name!r} of cartridge {version_id!r} is "
                "taken by another id (the server reads runs of . - _ as one _); use another id"
            )
        return True

    def is_known(self, version_id: str) -> bool:
        """Whether the id stands for a content already."""
        return version_id in self._content

    def bind(self, version_id: str, header: UploadHeader) -> None:
        """From here on the id stands for this content: the server may read it at any moment."""
        self._content[version_id] = header.model_dump_json()

    def unbind(self, version_id: str) -> None:
        """The server has nothing of this id; it may stand for something else."""
        del self._content[version_id]

    def check_room(self, num_bytes: int) -> None:
        """Could ``num_bytes`` more be made to fit? Deletes nothing.

        Raises:
            NoRoom: they could not.
        """
        self._room(num_bytes)

    def make_room(self, num_bytes: int) -> None:
        """Deletes the oldest unused versions of runs until ``num_bytes`` more fit.

        Raises:
            NoRoom: they do not; nothing was deleted.
        """
        for version_id in self._room(num_bytes):
            self._delete(version_id, "disk")

    def _room(self, num_bytes: int) -> list[str]:
        """What must go so that ``num_bytes`` more fit."""
        free, gone = self._max_bytes - self.num_bytes, []
        for version_id in self._expendable():
            if num_bytes <= free:
                break
            gone.append(version_id)
            free += self._versions[version_id].info.num_bytes
        if num_bytes > free:
            raise NoRoom(
                f"{num_bytes / 1e6:.0f} MB do not fit: {len(self._versions)} versions take "
                f"{self.num_bytes / 1e6:.0f} of {self._max_bytes / 1e6:.0f} MB, and each is in use "
                "or must be kept. Delete one with DELETE /cartridges/{id}, or raise max_disk_gb"
            )
        return gone

    def place(self, version_id: str, header: UploadHeader, folder: Path) -> VersionInfo:
        """Puts a version where the server reads it, whole or not at all; adds it nowhere.

        Args:
            folder: a :meth:`staging_folder` with the weights in it, gone afterwards.

        Raises:
            DiskFull: there is no room for it.
            DiskFailed: it cannot be written.
        """
        info = VersionInfo(
            id=version_id, created_at=time.time(), num_bytes=header.data_bytes, header=header
        )
        with named_disk(self.directory, whatever=True):
            write_config(folder, header.num_tokens, header.base_model)
            write_info(info, folder)
            try:
                move_into_place(folder, self.folder(version_id))
            except BaseException:
                # Renamed, and not certain to outlive a crash: nobody was told of it. Where it was
                # not renamed, what lies in its place is not ours.
                if not folder.exists():
                    self.discard(version_id)
                raise
        return info

    def add(self, info: VersionInfo) -> None:
        """From here on requests may name it; its run is cut to the newest few."""
        self._remember(info, signature(self.folder(info.id)))
        run = run_of(info.id)
        if run is not None:
            of_run = [name for name in self._versions if run_of(name) == run]
            for version_id in of_run[: -self._keep]:
                version = self._versions[version_id]
                if not version.in_use and time.monotonic() >= version.asked_again_until:
                    try:
                        self._delete(version_id, "kept_enough")
                    except DiskFailed as error:  # the new one works all the same
                        logger.error("%s stays: %s", version_id, error)
        self._count()

    # --- what goes ----------------------------------------------------------------------------

    def delete(self, version_id: str) -> VersionInfo:
        """Deletes a version that was asked to be deleted.

        Raises:
            Unknown: it is not there.
            Conflict: requests use it.
            DiskFailed: it cannot be deleted.
        """
        info = self.info(version_id)
        if count := self._versions[version_id].in_use:
            raise Conflict(f"{count} requests in flight use cartridge {version_id!r}; try later")
        self._delete(version_id, "asked")
        return info

    def discard(self, version_id: str) -> None:
        """Takes a written version away that was never added."""
        shutil.rmtree(self.folder(version_id), ignore_errors=True)

    def _expendable(self) -> list[str]:
        """Unused versions of runs, the oldest first, but never a run's newest."""
        newest = {run_of(name): name for name in self._versions}
        return [
            name
            for name, version in self._versions.items()
            if not version.in_use and run_of(name) is not None and newest[run_of(name)] != name
        ]

    def _remember(self, info: VersionInfo, written: Signature | None = None) -> None:
        self._versions[info.id] = _Version(info, written)
        self.bind(info.id, info.header)

    def _delete(self, version_id: str, reason: str) -> None:
        # A name and no new folder: that needs no room on a disk that may be full.
        gone = self.directory / STAGING / f"gone-{secrets.token_hex(8)}"
        with named_disk(self.directory, whatever=True):
            os.replace(self.folder(version_id), gone)
        del self._versions[version_id]
        # To free a quarter of a gigabyte takes a tenth of a second; nobody need wait for that.
        threading.Thread(target=_remove, args=(gone,), name="delete").start()
        self._metrics.deleted.labels(reason).inc()
        self._count()

    def _count(self) -> None:
        self._metrics.versions.set(len(self._versions))
        self._metrics.refused.set(len(self._refused))
        self._metrics.disk_bytes.set(self.num_bytes)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.error("%s takes room until it is deleted: %s", folder, error)
