"""The server process behind the gateway: killed, stopped, started again, drained."""

from __future__ import annotations

import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.http import ClientSettings
from cartridge_distill.rollout.protocol import CartridgeRef
from tests.gateway.rig import TOKEN, Rig, until, upload_bytes

pytestmark = pytest.mark.integration
PATIENT = ClientSettings(max_attempts=8, backoff_s=0.2, max_backoff_s=3.0)


def in_background(call: Any) -> tuple[threading.Thread, list[httpx.Response]]:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(call()))
    thread.start()
    return thread, answers


def long_request(rig: Rig, version: str | None = None) -> httpx.Response:
    return rig.complete(version, max_tokens=400, ignore_eos=True)


def in_flight(rig: Rig, count: int = 1) -> None:
    until(lambda: rig.metric("completions_in_flight") >= count, f"{count} requests in flight")


async def test_a_killed_server_is_started_again_with_its_cartridges_and_sigterm_finishes(
    start_rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = start_rig()
    monkeypatch.setenv("TOKASAURUS_API_KEY", TOKEN)
    assert rig.put("kept-step-000001", upload_bytes(seed=1)).status_code == 201
    first = rig.server
    thread, answers = in_background(lambda: long_request(rig, "kept-step-000001"))
    in_flight(rig)
    first.kill()
    thread.join()
    # what was in flight is told to ask again ...
    assert answers[0].status_code == 503 and answers[0].headers["Retry-After"] == "1"
    # ... what comes meanwhile waits, and is answered by the next server, cartridge and all
    async with TokasaurusClient(rig.url, PATIENT) as client:
        ref = CartridgeRef(id="kept-step-000001", source="local")
        [done] = await client.complete([1, 2, 3], 4, 0.0, [ref])
        assert done.token_ids
    assert rig.server.pid != first.pid
    assert rig.log.count("the server process died (exit code -9); starting it again") == 1
    assert rig.metric("server_restarts_total", "died") == 1
    assert rig.put("kept-step-000002", upload_bytes(seed=2)).status_code == 201
    # SIGTERM: what is in flight is finished first
    second = rig.server
    thread, answers = in_background(lambda: long_request(rig))
    in_flight(rig)
    rig.process.send_signal(signal.SIGTERM)
    thread.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 400
    assert rig.process.wait(30) == 0
    assert not second.is_running()
    assert "Traceback" not in rig.log


def test_a_server_that_is_not_there_or_hangs(start_rig: Any) -> None:
    rig = start_rig("--hold-s", 0.1, "--stall-s", 2)
    rig.server.send_signal(signal.SIGKILL)
    until(lambda: rig.http.get("/ping").status_code == 503, "ping tells")
    answer = rig.complete()
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"
    # an upload that cannot be made to work is not there
    refused = rig.put("late-step-000001", upload_bytes())
    assert refused.status_code == 503
    assert rig.on_disk() == []
    rig.wait_up()
    assert rig.put("late-step-000001", upload_bytes()).status_code == 201
    # one that hangs is started again
    first = rig.server
    first.suspend()  # alive, and silent: as the real one with a dead model process
    assert long_request(rig).status_code == 503
    until(rig.is_up, "it is up again")
    assert rig.server.pid != first.pid
    assert "has sent nothing for" in rig.log
    assert rig.metric("server_restarts_total", "stalled") == 1
    assert rig.complete().status_code == 200


def test_sigterm_does_not_wait_for_ever(start_rig: Any) -> None:
    rig = start_rig("--drain-s", 1)
    child = rig.server
    child.suspend()
    with httpx.Client(headers=dict(rig.http.headers), timeout=30) as http:
        thread = threading.Thread(
            target=lambda: _ignore_errors(http, rig.url + "/v1/models"), daemon=True
        )
        thread.start()
        rig.process.send_signal(signal.SIGTERM)
        assert rig.process.wait(40) is not None
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def _ignore_errors(http: httpx.Client, url: str) -> None:
    try:
        http.get(url)
    except httpx.HTTPError:
        pass  # cut off, as it must be


def test_a_server_that_cannot_start_ends_the_gateway_with_the_reason(start_rig: Any) -> None:
    rig = start_rig(wait=False, server=("--no-such-option",))
    assert rig.process.wait(60) == 1
    assert "error: --no-such-option: no such option; fix: " in rig.log
    assert "did not come up 3 times" in rig.log


def test_a_killed_gateway_takes_its_server_along_and_the_next_one_finds_its_versions(
    start_rig: Any,
) -> None:
    rig = start_rig()
    child = rig.server
    assert rig.put("old-step-000001", upload_bytes(seed=1)).status_code == 201
    rig.process.kill()  # it must not need a chance to tidy up
    rig.process.wait()
    until(
        lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE,
        "the server ends, too",
    )
    (rig.cartridges / ".staging" / "half").write_bytes(b"x" * 100)
    (rig.cartridges / ".old-step-000002.abc").mkdir()
    foreign = rig.cartridges / "foreign"
    foreign.mkdir()
    (foreign / "cartridge.pt").write_bytes(b"who knows")
    rig.start()
    assert rig.on_disk() == ["foreign", "old-step-000001"]
    assert rig.complete("old-step-000001").status_code == 200
    assert rig.complete("foreign").status_code == 404
    assert "was not put there by a gateway and is not served" in rig.log
    assert rig.put("old-step-000001", upload_bytes(seed=2)).status_code == 409


def test_the_second_defence_restarts_between_versions_without_a_failed_request(
    start_rig: Any,
) -> None:
    # a page is 16 tokens: four versions fit
    rig = start_rig("--defence", "restart", "--page-budget", 4, "--max-cartridge-tokens", 64)
    stop = threading.Event()
    statuses: list[int] = []

    def keep_asking() -> None:
        while not stop.is_set():
            statuses.append(rig.complete(max_tokens=30, ignore_eos=True).status_code)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(keep_asking)
        try:
            for step in range(6):
                version = f"run-step-{step:06d}"
                assert rig.put(version, upload_bytes(seed=step, step=step)).status_code == 201
                assert rig.complete(version).status_code == 200
            until(lambda: len(statuses) > 20, "requests beside the uploads")
        finally:
            stop.set()
    assert set(statuses) == {200}
    assert rig.metric("server_restarts_total", "pages") == 1
    assert rig.metric("server_restarts_total", "died") == 0


def test_a_budget_that_one_cartridge_exceeds_is_refused(model_folder: Path) -> None:
    import os
    import sys

    done = subprocess.run(
        [
            *(sys.executable, "-m", "cartridge_distill.gateway", "--model", str(model_folder)),
            *("--defence", "restart", "--page-budget", "3", "--max-cartridge-tokens", "64"),
        ],
        env={**os.environ, "TOKASAURUS_API_KEY": TOKEN},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "restarted for ever" in done.stderr
