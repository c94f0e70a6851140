"""A version whose hash follows it: described, sent and read as one whose hash comes first."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.rollout.http import ClientSettings
from cartridge_distill.sync.http import HttpPublisher
from cartridge_distill.sync.upload import (
    DIGEST_BYTES,
    FORMATS,
    Upload,
    UploadHeader,
    encode,
    read_head,
    sha256,
    streamed,
)
from cartridge_distill.util.errors import CartridgeFormatError, SyncError
from tests.tiny import random_cartridge, tiny_model
from tests.two_servers import Answer, Asked, serving

VERSION = "run-20260101000000-abcd-step-000007"


def taken(dtype: torch.dtype = torch.bfloat16) -> Snapshot:
    return Snapshot.take(random_cartridge(tiny_model("gemma3"), 16).state_dict(), dtype)


def upload_of(snapshot: Snapshot) -> Upload:
    digest: Future[bytes] = Future()
    digest.set_result(sha256(snapshot))
    return streamed(snapshot, "base", 7, digest)


def file_of(upload: Upload) -> bytes:
    assert upload.digest is not None
    return b"".join(bytes(chunk) for chunk in upload.chunks(1000)) + upload.digest.result()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_the_safetensors_library_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    snapshot = taken(dtype)
    upload = upload_of(snapshot)
    data = file_of(upload)
    assert len(data) == upload.num_bytes
    (tmp_path / "v.safetensors").write_bytes(data)
    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        for name, tensor in snapshot.items():
            assert torch.equal(file.get_tensor(name), tensor)
        assert bytes(file.get_tensor("sha256").tolist()) == sha256(snapshot)


def test_it_is_described_as_one_whose_hash_comes_first() -> None:
    snapshot = taken()
    upload, other = upload_of(snapshot), encode(snapshot, "base", 7)
    found = read_head(file_of(upload))
    assert found is not None and found.header == upload.header
    ours = found.header.model_dump(exclude={"format"})
    assert ours == other.header.model_dump(exclude={"format", "sha256"})
    first = read_head(b"".join(map(bytes, other.chunks())))
    assert first is not None and found.starts == first.starts
    assert isinstance(first.header, UploadHeader)
    assert first.header.sha256 == sha256(snapshot).hex()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e.pop("sha256"), "ends with a tensor sha256"),
        (lambda e: e["sha256"].update(shape=[16]), "ends with a tensor sha256"),
        (lambda e: e["sha256"].update(data_offsets=[0, 32]), "ends with a tensor sha256"),
        (lambda e: e["__metadata__"].update(sha256="0" * 64), "metadata sha256"),
        (lambda e: e["__metadata__"].update(format="cartridge-version/3"), "metadata format"),
        (lambda e: e["__metadata__"].update(format=FORMATS[0]), "metadata sha256"),
    ],
)
def test_a_description_that_is_not_one_is_refused(
    change: Callable[[Any], object], words: str
) -> None:
    head = upload_of(taken()).head
    entries = json.loads(head[8:])
    change(entries)
    text = json.dumps(entries).encode()
    with pytest.raises(CartridgeFormatError, match=words):
        read_head(struct.pack("<Q", len(text)) + text)


def published(formats: object) -> bytes:
    """What a gateway that says this of itself is sent."""
    bodies: list[bytes] = []

    def answer(asked: Asked) -> Answer:
        if asked.method == "GET":
            return 200, {}, json.dumps({"cartridges": [], "formats": formats}).encode()
        bodies.append(asked.body)
        return 201, {}, b"{}"

    with serving(answer) as gateway:
        HttpPublisher([gateway.url], "base").publish(VERSION, taken())
    (body,) = bodies
    return body


def test_a_gateway_that_takes_it_is_sent_it() -> None:
    assert published(list(FORMATS)) == file_of(upload_of(taken()))


@pytest.mark.parametrize("formats", [[FORMATS[0]], [], None, "cartridge-version/2"])
def test_an_earlier_gateway_is_sent_the_hash_first(formats: object) -> None:
    assert published(formats) == b"".join(map(bytes, encode(taken(), "base", 7).chunks()))


def test_each_attempt_and_each_server_is_sent_all_of_it() -> None:
    bodies: list[bytes] = []

    def answer(asked: Asked) -> Answer:
        if asked.method == "GET":
            return 200, {}, json.dumps({"formats": list(FORMATS)}).encode()
        bodies.append(asked.body)
        return (503, {}, b"later") if len(bodies) == 1 else (201, {}, b"{}")

    patience = ClientSettings(max_attempts=2, backoff_s=0.01)
    with serving(answer) as one, serving(answer) as other:
        HttpPublisher([one.url, other.url], "base", patience).publish(VERSION, taken())
    whole = file_of(upload_of(taken()))
    assert bodies == [whole] * 3
    assert (
        hashlib.sha256(whole[len(upload_of(taken()).head) : -DIGEST_BYTES]).digest()
        == (whole[-DIGEST_BYTES:])
    )


def test_a_gateway_that_refuses_the_version_is_heard() -> None:
    def answer(asked: Asked) -> Answer:
        if asked.method == "GET":
            return 200, {}, json.dumps({"formats": list(FORMATS)}).encode()
        return 422, {}, b'{"detail": "another model"}'

    with serving(answer) as gateway, pytest.raises(SyncError, match="another model"):
        HttpPublisher([gateway.url], "base").publish(VERSION, taken())
