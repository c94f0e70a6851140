"""A disk that is full or fails is an error with the disk's name, whatever library was writing."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from cartridge_distill.cartridge.checkpoint import write_cartridge
from cartridge_distill.cartridge.formats.stored_cartridge import CartridgeMeta, StoredCartridge
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.sync.shared_dir import SharedDirectoryPublisher
from cartridge_distill.util.disk import (
    DiskFailed,
    DiskFull,
    fetch_from_disk,
    named_disk,
    reading_disk,
)
from cartridge_distill.util.errors import CartridgeFormatError, SyncError
from cartridge_distill.util.journal import Journal
from cartridge_distill.util.parquet import write_table
from tests.failing_disks import Disk, unreadable
from tests.tiny import random_cartridge, tiny_model

# In a process of its own, whose files may not be larger than some kilobytes: the system's error is
# another one than that of a full disk, the libraries' ways of telling it are the same.
_WRITE = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
import torch
from tests.failing_disks import Disk, unreadable
from tests.tiny import random_cartridge, tiny_model
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.cartridge.formats.stored_cartridge import CartridgeMeta, StoredCartridge
from cartridge_distill.cartridge.checkpoint import write_cartridge
from cartridge_distill.sync.shared_dir import SharedDirectoryPublisher
from cartridge_distill.util.disk import DiskFull
from cartridge_distill.util.errors import SyncError
from cartridge_distill.util.journal import Journal
from cartridge_distill.util.parquet import write_table
snapshot = Snapshot.take(random_cartridge(tiny_model(), 64).state_dict(), torch.float32)
stored = StoredCartridge(snapshot, CartridgeMeta("tiny"))
where = Path(sys.argv[1])
for kind, name in (("native", "n"), ("hazyresearch", "h.pt"), ("tokasaurus", "t")):
    try:
        write_cartridge(stored, where / name, kind)
    except DiskFull as error:
        print(kind, error)
try:
    SharedDirectoryPublisher(where, "tiny").publish("run-step-000001", snapshot)
except SyncError as error:
    print("sync", error)
print(sorted(path.name for path in where.iterdir()))
"""


@pytest.mark.integration
def test_every_writer_names_the_disk_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WRITE, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    *lines, left = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        *("native", "hazyresearch", "tokasaurus", "sync"),
    ], done.stdout + done.stderr
    assert all(f"the disk of {tmp_path} does not take" in line for line in lines)
    assert left == "[]"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    with pytest.raises(DiskFull, match=f"the disk of {small_disk} .*0.[01] MB are free"):
        with named_disk(small_disk):
            torch.save(torch.zeros(100_000), small_disk / "file.pt")
    with pytest.raises(DiskFull, match="No space left on device"):
        with named_disk(small_disk), (small_disk / "other").open("wb") as file:
            file.write(bytes(10**6))


def test_other_errors_stay_what_they_are() -> None:
    for error in (
        FileNotFoundError(errno.ENOENT, "no"),
        RuntimeError("shapes differ"),
        ValueError("x (os error 2)"),
    ):
        with pytest.raises(type(error)) as caught, named_disk(Path("/")):
            raise error
        assert caught.value is error and not isinstance(caught.value, DiskFull)


def test_a_quota_and_a_limit_of_files_are_no_room() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with pytest.raises(DiskFull, match=os.strerror(number)), named_disk(Path("/")):
            raise OSError(number, "whatever")


def test_a_disk_that_fails_is_named() -> None:
    """With an error of the system itself: the memory of a process has no page at 0."""
    memory = os.open("/proc/self/mem", os.O_RDWR)
    try:
        with pytest.raises(DiskFailed, match="cannot be written to .Input/output error."):
            with named_disk(Path("/some/folder")):
                os.pwrite(memory, b"x", 0)
    finally:
        os.close(memory)


def test_a_read_only_disk_is_named_by_every_writer(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    snapshot = Snapshot.take(random_cartridge(tiny_model(), 16).state_dict(), torch.float32)
    stored = StoredCartridge(snapshot, CartridgeMeta("tiny"))
    told = "Read-only file system"
    for kind, name in (("native", "n"), ("hazyresearch", "h.pt"), ("tokasaurus", "t")):
        with pytest.raises(DiskFailed, match=f"{small_disk} cannot be written to .{told}"):
            write_cartridge(stored, small_disk / name, kind)
    with pytest.raises(SyncError, match=f"run-step-000001 cannot be written: .*{told}"):
        SharedDirectoryPublisher(small_disk, "tiny").publish("run-step-000001", snapshot)


def test_a_server_takes_every_error_of_the_system_for_one_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(DiskFailed, match="No such file"), named_disk(tmp_path, whatever=True):
        (tmp_path / "gone" / "file").write_text("x")


def test_journals_and_tables_name_the_disk_too(small_disk: Path) -> None:
    table = pa.table({"text": [str(number) * 40 for number in range(10_000)]})
    with pytest.raises(DiskFull, match=f"the disk of {small_disk} "):
        write_table(table, small_disk / "rows.parquet")
    (small_disk / "rows.parquet").unlink(missing_ok=True)
    journal = Journal(small_disk / "rows.jsonl", {"seed": 0})
    journal.append({"task": 0})
    with pytest.raises(DiskFull, match=f"the disk of {small_disk} "):
        journal.append({"task": 1, "text": "x" * 10**6})
    journal.append({"task": 2})  # where there is room for it
    journal.close()
    with Journal(small_disk / "rows.jsonl", {"seed": 0}) as journal:
        assert journal.rows == [{"task": 0}, {"task": 2}] and not journal.torn


def test_a_disk_that_is_gone_is_told_before_a_file_is_mapped(tmp_path: Path) -> None:
    """Touched later, the mapped file would end the process."""
    disk = Disk(tmp_path, tmp_path / "disk")
    try:
        path = tmp_path / "disk" / "file"
        path.write_bytes(os.urandom(2**16))
        with path.open("rb") as file:
            fetch_from_disk(file)
        disk.fail()
        with path.open("rb") as file, pytest.raises(OSError) as told:
            fetch_from_disk(file)
        assert told.value.errno == errno.EIO
    finally:
        disk.close()


def test_what_is_read_names_the_file_and_only_a_failing_disk_is_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(DiskFailed, match=r"file cannot be read \(Input/output error\)"):
        with reading_disk(path):
            raise OSError(errno.EIO, "as of a bad block")
    with pytest.raises(FileNotFoundError), reading_disk(path):
        path.read_bytes()
    with pytest.raises(ValueError), reading_disk(path):
        raise ValueError("damaged")
    # A file's own words are no error of the system's.
    with pytest.raises(CartridgeFormatError), reading_disk(path):
        raise CartridgeFormatError("its record '[errno 5]' is compressed")
    path.touch()
    with unreadable(path), pytest.raises(DiskFailed, match="Input/output error"):
        with reading_disk(path):
            path.read_bytes()
