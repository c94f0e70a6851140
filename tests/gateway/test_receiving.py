"""An upload is written once, in place, from two pieces of memory: whatever order its bytes have."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import struct
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from cartridge_distill.cartridge.formats import hazyresearch
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.gateway import receiving
from cartridge_distill.gateway.receiving import receive
from cartridge_distill.sync.upload import UploadHeader, encode, sha256, streamed
from cartridge_distill.util.disk import DiskFailed
from cartridge_distill.util.errors import CartridgeFormatError
from tests.tiny import random_cartridge, tiny_model


def taken(dtype: torch.dtype, tokens: int = 48) -> Snapshot:
    return Snapshot.take(random_cartridge(tiny_model("gemma3"), tokens).state_dict(), dtype)


def file_of(snapshot: Snapshot) -> bytes:
    return b"".join(bytes(chunk) for chunk in encode(snapshot, "base", 7).chunks())


def received(data: bytes, folder: Path, chunk: int) -> UploadHeader:
    async def body() -> AsyncIterator[bytes]:
        for start in range(0, len(data), chunk):
            yield data[start : start + chunk]

    folder.mkdir()
    return asyncio.run(receive(body(), folder, lambda _: None))


def assert_same(file: Path, snapshot: Snapshot) -> None:
    for mapped in (False, True):
        back = hazyresearch.read(file, mapped).snapshot
        assert back.dtype == snapshot.dtype
        for (name, got), (_, want) in zip(back.items(), snapshot.items(), strict=True):
            assert torch.equal(got, want), name


@pytest.mark.parametrize("chunk", [1000, 4096, 10**6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_what_arrives_is_what_a_reader_of_the_format_reads(
    tmp_path: Path, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pieces far smaller than a tensor, and of no common measure with one.
    monkeypatch.setattr(receiving, "PIECE_BYTES", 1004)
    monkeypatch.setattr(receiving, "_FLUSH_BYTES", 8 * 1004)
    snapshot = taken(dtype)
    header = received(file_of(snapshot), tmp_path / "v", chunk)
    assert header.num_tokens == 48
    assert_same(tmp_path / "v" / "cartridge.pt", snapshot)


def test_tensors_may_come_in_another_order(tmp_path: Path) -> None:
    snapshot = taken(torch.bfloat16)
    head = encode(snapshot, "base", 7).head
    entries, data = json.loads(head[8:]), b""
    for name, tensor in reversed(list(snapshot.items())):
        entries[name]["data_offsets"] = [len(data), len(data) + tensor.nbytes]
        data += tensor.view(torch.uint8).numpy().tobytes()
    entries["__metadata__"]["sha256"] = hashlib.sha256(data).hexdigest()
    text = json.dumps(entries).encode()
    received(struct.pack("<Q", len(text)) + text + data, tmp_path / "v", 700)
    assert_same(tmp_path / "v" / "cartridge.pt", snapshot)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_values_that_are_not_finite_are_refused(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    snapshot = taken(dtype)
    snapshot.parts["trainable_values"][1][0, 0, 0, 3] = value
    with pytest.raises(CartridgeFormatError, match=r"trainable_values\.1 .*not finite"):
        received(file_of(snapshot), tmp_path / "v", 10**6)


def test_large_numbers_are_not_taken_for_infinite_ones(tmp_path: Path) -> None:
    snapshot = taken(torch.float32)
    snapshot.parts["trainable_keys"][0][:] = 3e38  # their sum overflows
    received(file_of(snapshot), tmp_path / "v", 10**6)
    assert_same(tmp_path / "v" / "cartridge.pt", snapshot)


def test_a_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = file_of(taken(torch.bfloat16, 16))
    for number, cut in enumerate((0, 9, 5000, len(data) // 2, len(data) - 1)):
        with pytest.raises(CartridgeFormatError, match="ends after"):
            received(data[:cut], tmp_path / str(number), 999)


# --- a version whose hash follows it ----------------------------------------------------------


def streamed_file(snapshot: Snapshot, digest: bytes | None = None) -> bytes:
    known: Future[bytes] = Future()
    known.set_result(sha256(snapshot) if digest is None else digest)
    upload = streamed(snapshot, "base", 7, known)
    return b"".join(bytes(chunk) for chunk in upload.chunks()) + known.result()


@pytest.mark.parametrize("chunk", [7, 1000, 4096, 10**6])
def test_a_hash_that_follows_makes_the_same_version(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "PIECE_BYTES", 1004)
    monkeypatch.setattr(receiving, "_FLUSH_BYTES", 8 * 1004)
    snapshot = taken(torch.bfloat16)
    found = received(streamed_file(snapshot), tmp_path / "after", chunk)
    assert found == received(file_of(snapshot), tmp_path / "before", 10**6)
    for name in ("after", "before"):
        assert_same(tmp_path / name / "cartridge.pt", snapshot)
    files = [(tmp_path / name / "cartridge.pt").read_bytes() for name in ("after", "before")]
    assert files[0] == files[1]


def test_another_hash_a_changed_byte_a_cut_and_a_byte_too_many_are_refused(tmp_path: Path) -> None:
    snapshot = taken(torch.bfloat16, 16)
    data = streamed_file(snapshot)
    with pytest.raises(CartridgeFormatError, match="what follows them says 0000"):
        received(streamed_file(snapshot, bytes(32)), tmp_path / "other", 999)
    for place in (-33, -32, -1, len(data) // 2):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(CartridgeFormatError, match="SHA-256"):
            received(bytes(changed), tmp_path / str(place), 999)
    for cut in (len(data) - 33, len(data) - 32, len(data) - 1):
        with pytest.raises(CartridgeFormatError, match=f"ends after {cut} of {len(data)} bytes"):
            received(data[:cut], tmp_path / f"cut{cut}", 999)
    with pytest.raises(CartridgeFormatError, match="goes on after"):
        received(data + b"x", tmp_path / "long", 999)


def test_values_that_are_not_finite_are_refused_there_too(tmp_path: Path) -> None:
    snapshot = taken(torch.bfloat16)
    snapshot.parts["trainable_values"][1][0, 0, 0, 3] = float("nan")
    with pytest.raises(CartridgeFormatError, match=r"trainable_values\.1 .*not finite"):
        received(streamed_file(snapshot), tmp_path / "v", 10**6)


def test_a_disk_that_fails_in_the_middle_is_an_error_and_no_thread_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "PIECE_BYTES", 1004)
    write, calls = os.pwrite, 0

    def failing(descriptor: int, data: memoryview, place: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise OSError(errno.EIO, "a bad block")
        return write(descriptor, data, place)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(DiskFailed):
        received(streamed_file(taken(torch.bfloat16)), tmp_path / "v", 700)
    names = {thread.name.partition("_")[0] for thread in threading.enumerate()}
    assert not names & {"hash", "write"}
