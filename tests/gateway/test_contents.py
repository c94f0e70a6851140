"""An id stands for one content: also when it never worked, and whatever order its bytes came in."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.gateway.lock import DirectoryLock
from cartridge_distill.rollout.fingerprint import decode_fingerprint
from cartridge_distill.sync.http import HttpPublisher
from cartridge_distill.sync.upload import encode
from cartridge_distill.util.errors import ConfigError, SyncError
from tests.gateway.conftest import StartRig
from tests.gateway.rig import (
    COMPLETIONS,
    MODEL,
    MODEL_NAME,
    TOKEN,
    Rig,
    completion,
    until,
    upload_bytes,
)
from tests.tiny import plain_logprobs, random_cartridge

pytestmark = pytest.mark.integration


def is_of(answer: httpx.Response, seed: int) -> bool:
    """Whether an answer was computed with the cartridge of this seed."""
    assert answer.status_code == 200, answer.text
    [choice] = decode_fingerprint(answer.json()["system_fingerprint"], ["stop"], 259)
    prefix = random_cartridge(MODEL, 16, seed).prefix()
    expected = plain_logprobs(MODEL, prefix, [10, 20, 30], choice.token_ids, 0.7)
    return torch.allclose(torch.tensor(choice.logprobs), torch.tensor(expected), atol=1e-5)


def overflowing() -> bytes:
    tensors = {name: t.clone() for name, t in random_cartridge(MODEL, 16, 1).state_dict().items()}
    for tensor in tensors.values():
        tensor[:] = 3e38
    upload = encode(Snapshot.take(tensors, torch.float32), MODEL_NAME, 0)
    return b"".join(bytes(chunk) for chunk in upload.chunks())


def exchanged(body: bytes, one: str, other: str) -> bytes:
    """The same bytes, of which two tensors have exchanged their places: other layers' weights."""
    (length,) = struct.unpack("<Q", body[:8])
    entries = json.loads(body[8 : 8 + length])
    first, second = entries[one]["data_offsets"], entries[other]["data_offsets"]
    entries[one]["data_offsets"], entries[other]["data_offsets"] = second, first
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (length - len(text))
    return struct.pack("<Q", len(text)) + text + body[8 + length :]


def reordered(body: bytes) -> bytes:
    """The same weights, with the tensors of the file in another order."""
    (length,) = struct.unpack("<Q", body[:8])
    entries, tensors = json.loads(body[8 : 8 + length]), body[8 + length :]
    data = b""
    for name in sorted(entries.keys() - {"__metadata__"}, reverse=True):
        start, end = entries[name]["data_offsets"]
        entries[name]["data_offsets"] = [len(data), len(data) + end - start]
        data += tensors[start:end]
    entries["__metadata__"]["sha256"] = hashlib.sha256(data).hexdigest()
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


# --- what an id stands for --------------------------------------------------------------------


def test_an_id_is_bound_before_the_server_has_read_it(
    failing_gateway: tuple[httpx.Client, Path],
) -> None:
    http, flag = failing_gateway

    def put(version: str, body: bytes) -> httpx.Response:
        return http.put(f"/cartridges/{version}", content=body)

    def ask(version: str) -> httpx.Response:
        return http.post(COMPLETIONS, json=completion(version))

    flag.touch()  # the server reads the weights, and no forward with them works
    assert put("v", upload_bytes(seed=1)).status_code == 503
    assert ask("v").status_code == 404
    flag.unlink()
    other = put("v", upload_bytes(seed=2))
    assert other.status_code == 409 and "use a new id" in other.json()["detail"]
    assert ask("v").status_code == 404
    assert put("v", upload_bytes(seed=1)).status_code == 201  # the same may come again
    assert is_of(ask("v"), seed=1)
    assert put("w", upload_bytes(seed=2)).status_code == 201
    assert is_of(ask("w"), seed=2) and not is_of(ask("w"), seed=1)


def test_what_the_server_refused_leaves_its_id_free(rig: Rig) -> None:
    bad = overflowing()
    for _ in range(2):  # refused for what it is, not for having been here
        refused = rig.put("second-chance", bad)
        assert refused.status_code == 422 and "not finite" in refused.json()["detail"]
    assert rig.put("second-chance", upload_bytes(seed=4)).status_code == 201
    assert is_of(rig.complete("second-chance"), seed=4)
    # from here on it stands for that
    assert rig.put("second-chance", bad).status_code == 409
    assert rig.put("second-chance", upload_bytes(seed=5)).status_code == 409
    assert is_of(rig.complete("second-chance"), seed=4)
    assert rig.http.delete("/cartridges/second-chance").is_success


def test_weights_that_overflow_do_not_take_a_used_id_away(rig: Rig) -> None:
    """A request that fails over a good cartridge must not make the server read it anew."""
    assert rig.put("kept", upload_bytes(seed=6)).status_code == 201
    assert rig.complete("kept", prompt=[999_999]).status_code == 400
    assert is_of(rig.complete("kept"), seed=6)
    assert rig.put("kept", upload_bytes(seed=7)).status_code == 409
    assert rig.http.delete("/cartridges/kept").is_success


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("trainable_keys.0", "trainable_keys.1"),
        ("trainable_keys.0", "trainable_values.1"),
        ("frozen_values.0", "frozen_values.1"),
    ],
)
def test_exchanged_tensors_are_another_content(rig: Rig, one: str, other: str) -> None:
    version, body = (
        f"places-{one}-{other}".replace(".", "-").replace("_", "-"),
        upload_bytes(seed=8),
    )
    swapped = exchanged(body, one, other)
    assert rig.put(version, body).status_code == 201
    answer = rig.put(version, swapped)
    assert answer.status_code == 409, answer.text
    assert is_of(rig.complete(version), seed=8)
    assert rig.put(f"{version}-b", swapped).status_code == 201
    assert not is_of(rig.complete(f"{version}-b"), seed=8)
    for name in (version, f"{version}-b"):
        assert rig.http.delete(f"/cartridges/{name}").is_success


def test_the_order_of_the_file_is_no_part_of_the_content(rig: Rig) -> None:
    body = upload_bytes(seed=9)
    assert rig.put("order", reordered(body)).status_code == 201
    assert is_of(rig.complete("order"), seed=9)
    again = rig.put("order", body)
    assert (again.status_code, again.json()["is_new"]) == (200, False)
    told = rig.http.get("/cartridges/order").json()["header"]["sha256"]
    (length,) = struct.unpack("<Q", body[:8])
    assert told == hashlib.sha256(body[8 + length :]).hexdigest()  # of the tensors by name
    assert rig.http.delete("/cartridges/order").is_success


def test_a_name_that_stands_twice_in_a_header_is_refused(rig: Rig) -> None:
    body = upload_bytes(seed=9)
    (length,) = struct.unpack("<Q", body[:8])
    text = body[8 : 8 + length].rstrip()
    for twice in (b'"frozen_keys.0":{"dtype":"F32"}', b'"__metadata__":{}', b'"x":[NaN]'):
        head = text[:-1] + b"," + twice + b"}"
        answer = rig.put("twice", struct.pack("<Q", len(head)) + head + body[8 + length :])
        assert answer.status_code == 422, answer.text
        assert "is not JSON" in answer.json()["detail"]


# --- room -------------------------------------------------------------------------------------


def begun(rig: Rig, version: str, body: bytes, sent: int) -> None:
    """An upload of which only the first bytes are ever sent."""
    host, port = rig.url.removeprefix("http://").split(":")
    head = (
        f"PUT /cartridges/{version} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body[:sent])


def test_room_is_made_for_what_has_come_and_is_new(start_rig: StartRig) -> None:
    size = 16 * 2 * 2 * 2 * 16 * 4  # of a version's weights
    rig = start_rig("--max-disk-gb", 3.5 * size / 1e9, "--keep-versions", 50, "--idle-s", 5)
    versions = [f"run-step-{step:06d}" for step in range(3)]
    bodies = [upload_bytes(seed=step, step=step) for step in range(4)]
    for version, body in zip(versions, bodies, strict=False):
        assert rig.put(version, body).status_code == 201
    # announced, or begun and never sent; repeated; of another model; damaged; under a taken id
    for sent in (0, 5, 5000):
        begun(rig, "run-step-000003", bodies[3], sent)
    assert rig.put("run-step-000002", bodies[2]).status_code == 200
    assert rig.put("run-step-000003", upload_bytes(base_model="other")).status_code == 422
    assert rig.put("run-step-000003", bodies[3][:-1] + b"\xff").status_code == 422
    assert rig.put("run-step-000001", bodies[3]).status_code == 409
    until(lambda: rig.on_disk() == versions, "nothing was deleted for any of them")
    assert [entry["id"] for entry in rig.http.get("/cartridges").json()["cartridges"]] == versions
    # the next one, whole and new
    assert rig.put("run-step-000003", bodies[3]).status_code == 201
    assert rig.on_disk() == ["run-step-000001", "run-step-000002", "run-step-000003"]


def test_half_open_uploads_do_not_hold_all_places(start_rig: StartRig) -> None:
    rig = start_rig("--max-uploads", 2, "--idle-s", 5)
    host, port = rig.url.removeprefix("http://").split(":")
    body = upload_bytes(seed=1)
    head = (
        f"PUT /cartridges/half HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    # clients whose machine is gone: the connection stays open, and nothing comes
    dead = [socket.create_connection((host, int(port))) for _ in range(2)]
    try:
        for connection, sent in zip(dead, (20, len(body) - 100), strict=True):
            connection.sendall(head.encode() + body[:sent])
        # asked first: an upload that came before them would be taken, and then be "already there"
        until(lambda: rig.metric("uploads_in_flight") == 2, "both have a place")
        assert rig.put("alive", body).status_code == 429
        until(lambda: rig.put("alive", body).status_code == 201, "a place is free again")
        for connection in dead:
            connection.settimeout(30)
            assert connection.recv(2**16).startswith(b"HTTP/1.1 408")
    finally:
        for connection in dead:
            connection.close()
    assert rig.on_disk() == ["alive"]
    assert rig.metric('uploads_total{outcome="failed"}') == 0  # refused is what they were
    assert "Traceback" not in rig.log


# --- the disk, and two gateways on it ----------------------------------------------------------


def test_a_full_disk_is_a_507_and_a_sync_error(
    start_rig: StartRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = start_rig()
    monkeypatch.setenv("TOKASAURUS_API_KEY", TOKEN)
    small, large = upload_bytes(seed=1), upload_bytes(seed=2, tokens=64)
    # No file of the gateway may be larger: what it writes fails, as on a disk that is full.
    psutil.Process(rig.process.pid).rlimit(psutil.RLIMIT_FSIZE, (20_000, 20_000))
    answer = rig.put("large", large)
    assert answer.status_code == 507, answer.text
    assert f"the disk of {rig.cartridges}" in answer.json()["detail"]
    assert "inline_container" not in answer.text
    snapshot = Snapshot.take(random_cartridge(MODEL, 64, 2).state_dict(), torch.float32)
    with pytest.raises(SyncError, match=f"HTTP 507: the disk of {rig.cartridges}"):
        HttpPublisher([rig.url], MODEL_NAME).publish("run-step-000001", snapshot)
    assert rig.put("small", small).status_code == 201  # and it goes on
    assert rig.on_disk() == ["small"]
    assert "Traceback" not in rig.log


def test_a_second_gateway_on_a_directory_is_refused_by_name(
    start_rig: StartRig, model_folder: Path, tmp_path: Path
) -> None:
    first = start_rig()
    second = Rig(tmp_path / "second", model_folder, "--cartridge-dir", first.cartridges)
    second.start(wait=False)
    try:
        assert second.process.wait(60) == 2
        assert f"another gateway serves the cartridge directory {first.cartridges}" in second.log
        assert "Traceback" not in second.log
    finally:
        second.stop()
    assert first.put("mine", upload_bytes()).status_code == 201
    # a gateway that was killed holds nothing
    first.process.kill()
    first.process.wait()
    first.start()
    assert first.on_disk() == ["mine"]


def test_a_directory_is_locked_until_it_is_released(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path / "a" / "b")
    with pytest.raises(ConfigError, match="another gateway serves .*a/b"):
        DirectoryLock(tmp_path / "a" / "b")
    lock.release()
    DirectoryLock(tmp_path / "a" / "b").release()
    with pytest.raises(ConfigError, match="cartridge_dir .*file"):
        (tmp_path / "file").touch()
        DirectoryLock(tmp_path / "file")
