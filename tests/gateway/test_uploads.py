"""Uploads: what is right is served at once, what is not leaves nothing behind."""

from __future__ import annotations

import io
import pickle
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from cartridge_distill.cartridge.checkpoint import load_cartridge
from cartridge_distill.rollout.fingerprint import decode_fingerprint
from tests.gateway.conftest import StartRig
from tests.gateway.rig import MODEL, TOKEN, Rig, until, upload_bytes
from tests.tiny import plain_logprobs, random_cartridge

pytestmark = pytest.mark.integration


def logprobs_of(response: httpx.Response) -> tuple[list[int], list[float]]:
    assert response.status_code == 200, response.text
    [choice] = decode_fingerprint(response.json()["system_fingerprint"], ["stop"], 259)
    assert choice.logprobs is not None
    return choice.token_ids, choice.logprobs


def test_an_answered_upload_works_at_once(rig: Rig) -> None:
    answer = rig.put("works-step-000001", upload_bytes(seed=5, step=1))
    assert answer.status_code == 201, answer.text
    assert answer.json()["is_new"] is True
    ids, logprobs = logprobs_of(rig.complete("works-step-000001"))
    prefix = random_cartridge(MODEL, 16, seed=5).prefix()
    expected = plain_logprobs(MODEL, prefix, [10, 20, 30], ids, 0.7)
    assert torch.allclose(torch.tensor(logprobs), torch.tensor(expected), atol=1e-5)
    # what the server reads is what the real one reads: two files, loaded safely
    written = load_cartridge(rig.cartridges / "works-step-000001")
    assert torch.equal(written.trainable_keys[0], random_cartridge(MODEL, 16, 5).trainable_keys[0])
    told = rig.http.get("/cartridges/works-step-000001").json()
    assert told["header"]["num_tokens"] == 16 and told["header"]["step"] == 1
    assert told in rig.http.get("/cartridges").json()["cartridges"]


def test_versions_never_change(rig: Rig) -> None:
    body = upload_bytes(seed=1)
    assert rig.put("fixed", body).status_code == 201
    again = rig.put("fixed", body)
    assert (again.status_code, again.json()["is_new"]) == (200, False)
    other = rig.put("fixed", upload_bytes(seed=2))
    assert other.status_code == 409 and "use a new id" in other.json()["detail"]
    # and not after it was deleted, for the server may hold it still
    assert rig.http.delete("/cartridges/fixed").status_code == 200
    assert rig.put("fixed", upload_bytes(seed=2)).status_code == 409
    assert rig.http.delete("/cartridges/fixed").status_code == 404
    assert "fixed" not in rig.on_disk()


def test_two_ids_with_one_directory_do_not_mix(rig: Rig) -> None:
    assert rig.put("a.b", upload_bytes(seed=1)).status_code == 201
    answer = rig.put("a_b", upload_bytes(seed=2))
    assert answer.status_code == 409 and "taken by another id" in answer.json()["detail"]
    ids, logprobs = logprobs_of(rig.complete("a.b"))
    prefix = random_cartridge(MODEL, 16, seed=1).prefix()
    expected = plain_logprobs(MODEL, prefix, [10, 20, 30], ids, 0.7)
    assert torch.allclose(torch.tensor(logprobs), torch.tensor(expected), atol=1e-5)
    assert rig.http.delete("/cartridges/a.b").status_code == 200


def a_pickle() -> bytes:
    file = io.BytesIO()
    torch.save({"trainable_keys": [torch.zeros(1)]}, file)
    return file.getvalue()


def with_nan() -> bytes:
    body = bytearray(upload_bytes(seed=3))
    body[-4:] = struct.pack("<f", float("nan"))
    return bytes(body)


def altered() -> bytes:
    body = bytearray(upload_bytes(seed=3))
    body[-1] ^= 1
    return bytes(body)


BAD = {
    "wrong checksum": (altered, "SHA-256"),
    "not finite, and so another checksum": (with_nan, "SHA-256"),
    "truncated in the tensors": (lambda: upload_bytes()[:-5], "ends after"),
    "truncated in the header": (lambda: upload_bytes()[:50], "within its safetensors header"),
    "empty": (lambda: b"", "within its safetensors header"),
    "too long": (lambda: upload_bytes() + b"x", "goes on after"),
    "a .pt file": (a_pickle, "pickled files are never accepted"),
    "a pickle": (lambda: pickle.dumps([1] * 100, protocol=4), "pickled files are never accepted"),
    "another model": (lambda: upload_bytes(base_model="llama"), "base_model='llama'"),
    "no multiple of 16": (lambda: upload_bytes(tokens=24), "no multiple of 16"),
    "too many tokens": (lambda: upload_bytes(tokens=80), "max_cartridge_tokens=64"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_bad_uploads_are_refused_with_the_reason(rig: Rig, case: str, chunked: bool) -> None:
    make, words = BAD[case]
    body, before = make(), rig.on_disk()

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 700):
            yield body[start : start + 700]

    content: Any = pieces() if chunked else body
    answer = rig.http.put("/cartridges/bad-step-000001", content=content)
    assert answer.status_code == 422, answer.text
    assert words in answer.json()["detail"]
    assert rig.on_disk() == before
    assert rig.complete("bad-step-000001").status_code == 404
    assert TOKEN not in rig.log and "Traceback" not in rig.log


def test_another_shape_is_refused_with_the_number_that_differs(rig: Rig) -> None:
    from cartridge_distill.cartridge.snapshot import Snapshot
    from cartridge_distill.sync.upload import encode

    tensors = {
        f"{part}_{kind}.{layer}": torch.zeros(1, 2, 15 if part == "trainable" else 1, 16)
        for part in ("frozen", "trainable")
        for kind in ("keys", "values")
        for layer in range(3)
    }
    upload = encode(Snapshot.take(tensors, torch.float32), "tiny", 0)
    answer = rig.put("bad", b"".join(bytes(chunk) for chunk in upload.chunks()))
    assert answer.status_code == 422
    assert "num_layers=3, this server has 2" in answer.json()["detail"]


@pytest.mark.parametrize(
    "name", ["..", "%2e%2e%2fetc", "a%2fb", ".hidden", "a b", "ä", "x" * 129, "-x", "a;b", "a%00"]
)
def test_an_id_that_is_none_is_refused(rig: Rig, name: str) -> None:
    before = rig.on_disk()
    answer = rig.http.put(f"/cartridges/{name}", content=upload_bytes())
    assert answer.status_code in (404, 405, 422), answer.text
    assert rig.on_disk() == before
    assert sorted(p.name for p in rig.cartridges.parent.iterdir()) == ["cartridges", "gateway.log"]


def announce(rig: Rig, size: int, token: str | None = TOKEN) -> str:
    """The answer to an upload that is announced and never sent."""
    host, port = rig.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        lines = [f"PUT /cartridges/huge HTTP/1.1\r\nHost: {host}\r\nContent-Length: {size}\r\n"]
        if token is not None:
            lines.append(f"Authorization: Bearer {token}\r\n")
        connection.sendall("".join([*lines, "\r\n"]).encode())
        return connection.makefile().read()  # the gateway closes: it did not read the body


def test_ten_gigabytes_are_refused_when_they_are_announced(rig: Rig) -> None:
    answer = announce(rig, 10 * 2**30)
    assert answer.startswith("HTTP/1.1 413") and "the limit here is" in answer


def test_nothing_is_read_without_the_token(rig: Rig) -> None:
    for token, words in ((None, "missing"), ("x" * 30, "wrong"), ("", "wrong")):
        answer = announce(rig, 1000, token)
        assert answer.startswith("HTTP/1.1 401") and words in answer
    assert "x" * 30 not in rig.log


def test_a_client_that_vanishes_leaves_nothing(rig: Rig) -> None:
    before = rig.on_disk()
    body = upload_bytes()
    host, port = rig.url.removeprefix("http://").split(":")
    head = (
        f"PUT /cartridges/gone HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body[:-100])
    assert rig.put("after", upload_bytes(seed=8)).status_code == 201  # and it goes on
    assert rig.http.delete("/cartridges/after").status_code == 200
    assert rig.on_disk() == before
    assert "Traceback" not in rig.log


def test_a_run_keeps_its_newest_versions_and_what_is_in_use(rig: Rig) -> None:
    for step in range(3):
        assert rig.put(f"kept-step-{step:06d}", upload_bytes(seed=step, step=step)).is_success
    assert rig.put("by-hand", upload_bytes(seed=9)).is_success
    answers: list[httpx.Response] = []
    long = threading.Thread(
        target=lambda: answers.append(
            rig.complete("kept-step-000000", max_tokens=300, ignore_eos=True)
        )
    )
    long.start()
    until(lambda: rig.metric("completions_in_flight"), "the long request is in flight")
    refused = rig.http.delete("/cartridges/kept-step-000000")
    assert refused.status_code == 409 and "in flight" in refused.json()["detail"]
    for step in range(3, 5):
        assert rig.put(f"kept-step-{step:06d}", upload_bytes(seed=step, step=step)).is_success
    assert not answers, "the request ended too early for this test to show anything"
    there = {"kept-step-000000", *(f"kept-step-{step:06d}" for step in (2, 3, 4))}
    assert there <= set(rig.on_disk()) and "kept-step-000001" not in rig.on_disk()
    long.join()
    assert answers[0].status_code == 200
    assert rig.put("kept-step-000005", upload_bytes(seed=5, step=5)).is_success
    kept = [name for name in rig.on_disk() if name.startswith("kept")]
    assert kept == [f"kept-step-{step:06d}" for step in (3, 4, 5)]
    assert "by-hand" in rig.on_disk()  # an id that no run made is nobody's to delete
    assert rig.metric("versions") == len(rig.on_disk())


def peak_bytes(pid: int) -> int:
    """The most memory the process ever had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def test_many_large_uploads_at_once_take_little_memory(start_rig: StartRig) -> None:
    tokens = 131_072  # 64 MiB in float32
    rig = start_rig("--max-cartridge-tokens", tokens, "--max-uploads", 3)
    body = bytearray(upload_bytes(seed=1, tokens=tokens))
    body[-1] ^= 1  # refused at the very end, so that the small server need not load it
    before = peak_bytes(rig.process.pid)
    arrived, go = threading.Barrier(4), threading.Event()

    def slow() -> Iterator[bytes]:
        yield bytes(body[: 2**20])
        arrived.wait(30)
        go.wait(30)
        for start in range(2**20, len(body), 2**20):
            yield bytes(body[start : start + 2**20])

    with ThreadPoolExecutor(3) as pool:
        running = [
            pool.submit(rig.http.put, f"/cartridges/large-{number}", content=slow())
            for number in range(3)
        ]
        arrived.wait(30)
        until(lambda: rig.metric("uploads_in_flight") == 3, "three arrive")
        one_more = rig.put("one-more", upload_bytes())
        go.set()
        answers = [future.result() for future in running]
    assert one_more.status_code == 429 and one_more.headers["Retry-After"] == "1"
    assert [answer.status_code for answer in answers] == [422] * 3
    assert all("SHA-256" in answer.json()["detail"] for answer in answers)
    assert peak_bytes(rig.process.pid) - before < len(body)  # of three that came
    assert rig.on_disk() == []
