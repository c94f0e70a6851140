"""Thousands of hostile requests to a real gateway, and to the server behind it.

``ATTACK_REQUESTS`` (10,000) and ``ATTACK_SECONDS`` (600) bound it; ``ATTACK_SEED`` makes others.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.attack.made import Maker, Target
from tests.gateway.rig import TOKEN, Rig, until, upload_bytes

pytestmark = [pytest.mark.long, pytest.mark.integration, pytest.mark.timeout(7200)]
REQUESTS = int(os.environ.get("ATTACK_REQUESTS", "10000"))
SECONDS = float(os.environ.get("ATTACK_SECONDS", "600"))
SEED = int(os.environ.get("ATTACK_SEED", "0"))
HANGS_AFTER_S = 30.0
"""No request costs the server a tenth of a second of its own; a busy machine may take long."""
MOST_MEMORY = 8 * 2**30  # of addresses, torch's libraries and threads included
MOST_GROWTH = 512 * 2**20


@pytest.fixture
def attacked(model_folder: Path, tmp_path: Path) -> Iterator[Rig]:
    limits = (
        *("--max-request-tokens", 400, "--max-cartridge-tokens", 64, "--keep-versions", 3),
        *("--max-choices", 4, "--idle-s", 1),
    )
    with Rig(tmp_path, model_folder, *limits, server=("--idle-s", "1")) as rig:
        assert rig.put("base", upload_bytes(seed=1)).status_code == 201
        for process in (psutil.Process(rig.process.pid), rig.server):
            process.rlimit(psutil.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
        yield rig


def is_whole(came: bytes, request: bytes) -> bool:
    """Whether an answer is there, on a connection that may stay open."""
    head, found, body = came.partition(b"\r\n\r\n")
    if not found:
        return False
    size = re.search(rb"content-length: (\d+)", head.lower())
    if size is None:
        return body.endswith(b"0\r\n\r\n")
    return len(body) >= int(size[1]) or request.startswith(b"HEAD")


def status_of(address: tuple[str, int], request: bytes) -> str:
    """What became of a request: a status, or ``closed``."""
    with socket.create_connection(address, timeout=HANGS_AFTER_S) as connection:
        try:
            # And no end of it: a request that lies about its length is one that does not come.
            connection.sendall(request)
        except OSError:
            pass  # it was refused before all of it was sent; the answer may be there
        came = b""
        try:
            while not is_whole(came, request) and (chunk := connection.recv(2**16)):
                came += chunk
        except ConnectionResetError:
            pass
    return came[9:12].decode() if came.startswith(b"HTTP/1.1 ") else "closed"


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


@pytest.mark.parametrize("which", ["gateway", "server"])
def test_no_request_is_answered_with_a_500_or_never(attacked: Rig, which: str) -> None:
    rig = attacked
    process = psutil.Process(rig.process.pid) if which == "gateway" else rig.server
    if which == "gateway":
        port = int(rig.url.rpartition(":")[2])
    else:
        arguments = rig.server.cmdline()
        port = int(arguments[arguments.index("--port") + 1])
    address, token = ("127.0.0.1", port), TOKEN if which == "gateway" else None
    before, answer_before = peak_bytes(process.pid), rig.complete("base", temperature=0.0)
    maker = Maker(SEED, Target("127.0.0.1", token, upload_bytes(seed=2, step=1)))
    counts: Counter[str] = Counter()
    slowest, end = 0.0, time.monotonic() + SECONDS
    for number in range(REQUESTS):
        request, started = maker.next(), time.monotonic()
        try:
            status = status_of(address, request)
        except TimeoutError:
            status = "hangs"
        slowest = max(slowest, time.monotonic() - started)
        counts[status] += 1
        wrong = status == "hangs" or status.startswith("5")
        assert not wrong, (status, number, request[:2000], rig.log[-4000:])
        if time.monotonic() > end:
            break
    grown = peak_bytes(process.pid) - before
    print(
        f"\n{which}: {counts.total()} requests, seed {SEED}: {dict(sorted(counts.items()))}; "
        f"slowest {slowest:.2f} s, {grown / 1e6:.0f} MB more at the most, "
        f"load {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores"
    )
    assert counts["200"] and counts["422"] and counts["400"]  # it is the routes that were reached
    assert grown < MOST_GROWTH
    assert "Traceback" not in rig.log and rig.metric("server_up") == 1
    until(lambda: rig.metric("completions_in_flight") == 0, "nothing is left in flight")
    after = rig.complete("base", temperature=0.0)
    assert after.json()["choices"] == answer_before.json()["choices"]
    for reason in ("died", "stalled"):
        assert rig.metric("server_restarts_total", reason) == 0
