"""Disks that fail as real ones do: full, taken away, with a bad block. The faults are the kernel's.

Mounting needs rights that not everybody has; a test is skipped where they are missing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN: every later call fails with EIO, as of a disk that left


def run(*command: str | Path) -> None:
    """A command of the system; the test is skipped where it cannot be run."""
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip(f"there is no {command[0]} here")
    if done.returncode:
        pytest.skip(f"{command[0]} cannot be used here: {done.stderr.strip()}")


@contextmanager
def mounted(*options: str | Path) -> Iterator[None]:
    run("mount", *options)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(options[-1])], check=True)


class Disk:
    """A file system of its own, at ``folder``, whose device can be taken away.

    ext4 on a file that lies on another ext4. When the outer one is shut down, every read and write
    of the inner one's device fails.
    """

    def __init__(self, work: Path, folder: Path) -> None:
        self._outer, self._image, self._folder = work / "outer", work / "image", folder
        self._outer.mkdir()
        folder.mkdir(parents=True, exist_ok=True)
        self._image.touch()
        os.truncate(self._image, 96 * 2**20)
        run("mkfs.ext4", "-q", "-O", "^has_journal", self._image)
        self._mounts = ExitStack()
        self._mounts.enter_context(mounted("-o", "loop", self._image, self._outer))
        inner = self._outer / "image"
        inner.touch()
        os.truncate(inner, 48 * 2**20)
        run("mkfs.ext4", "-q", "-O", "^has_journal", inner)
        self._mount()

    def _mount(self) -> None:
        self._mounts.enter_context(mounted("-o", "loop", self._outer / "image", self._folder))

    def fail(self) -> None:
        """The device is gone; what was read lately is forgotten."""
        os.sync()
        for path in self._folder.rglob("*"):
            if path.is_file():
                forget(path)
        handle = os.open(self._outer, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, _SHUTDOWN, struct.pack("I", 0))
        finally:
            os.close(handle)

    def come_back(self) -> None:
        """After every process has let go of it."""
        self._mounts.close()
        self._mounts.enter_context(mounted("-o", "loop", self._image, self._outer))
        self._mount()

    def close(self) -> None:
        self._mounts.close()


def forget(path: Path) -> None:
    """The system reads the file from the disk when it is asked for next."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Reads of the file fail with EIO, as of a bad block: it is address 0 of this process."""
    with mounted("--bind", f"/proc/{os.getpid()}/mem", path):
        try:
            path.read_bytes()
        except OSError as error:
            if error.errno != errno.EIO:
                pytest.skip(f"no file reads as a bad block here: {error}")
        yield
