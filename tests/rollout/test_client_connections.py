"""The client's way to a server: starts that are waited for, credentials, connections, proxies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.http import RetryingHttp, auth_headers
from cartridge_distill.util.errors import RolloutError, ServerUnreachable
from tests.rollout.scripted import FAST, GOOD, Script, ask, closed_port


def test_connection_refused() -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    with pytest.raises(ServerUnreachable) as failure:
        ask(url)
    for word in (
        url,
        "failed 3 times",
        "ClientConnectorError",
        "cartridge-distill serve",
    ):
        assert word in str(failure.value)


def test_waiting_for_a_server_that_never_comes() -> None:
    url = f"http://127.0.0.1:{closed_port()}"

    async def wait() -> None:
        async with TokasaurusClient(url, replace(FAST, startup_timeout_s=0.3)) as client:
            assert not await client.ping()
            await client.wait_until_ready()

    with pytest.raises(ServerUnreachable) as failure:
        asyncio.run(wait())
    for word in (
        url,
        "ClientConnectorError",
        "cartridge-distill serve",
        "TOKASAURUS_URL",
    ):
        assert word in str(failure.value)


def test_a_cold_start_is_waited_for(script: Script, caplog: pytest.LogCaptureFixture) -> None:
    script.steps = [
        script.status(503),
        script.drop,
        script.status(404, b"modal-http: app is starting"),
        script.ok(b'{"message": "pong"}'),
        script.ok(b'{"object": "list", "data": [{"id": "tiny"}]}'),
    ]

    async def wait() -> list[str]:
        async with TokasaurusClient(script.url, FAST) as client:
            await client.wait_until_ready()
            return await client.models()

    with caplog.at_level(logging.INFO):
        assert asyncio.run(wait()) == ["tiny"]
    assert "waiting for the inference server" in caplog.text and script.url in caplog.text


def test_refused_credentials_are_not_waited_for(script: Script) -> None:
    script.steps = [script.status(401)]

    async def wait() -> None:
        async with TokasaurusClient(script.url, FAST) as client:
            await client.wait_until_ready()

    with pytest.raises(ServerUnreachable, match="MODAL_PROXY_KEY"):
        asyncio.run(wait())
    assert len(script.requests) == 1


def test_a_slow_answer_by_redirect(script: Script) -> None:
    """Modal answers 303 after a while; the result is fetched with GET from another address."""
    script.steps = [
        script.status(303, b"", Location="/result?id=1"),
        script.status(303, b"", Location="/result?id=1"),
        script.ok(),
    ]
    assert ask(script.url) == [GOOD]
    assert [path for path, _, _ in script.requests][1:] == ["/result?id=1"] * 2
    script.steps = [script.status(303, b"", Location="/result?id=1")]
    with pytest.raises(RolloutError, match="redirects"):
        ask(script.url)


def test_credentials_are_sent_and_never_logged(
    script: Script, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secrets = {
        "TOKASAURUS_API_KEY": "key-one",
        "MODAL_PROXY_KEY": "key-two",
        "MODAL_PROXY_SECRET": "key-three",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    script.steps = [script.status(500)]
    with caplog.at_level(logging.DEBUG), pytest.raises(RolloutError) as failure:
        ask(script.url)
    headers = {name.lower(): value for name, value in script.requests[0][1].items()}
    assert headers["authorization"] == "Bearer key-one"
    assert (headers["modal-key"], headers["modal-secret"]) == ("key-two", "key-three")
    for value in secrets.values():
        assert value not in caplog.text and value not in str(failure.value)


def test_half_a_pair_of_credentials() -> None:
    assert auth_headers({}) == {}
    with pytest.raises(RolloutError, match="both"):
        auth_headers({"MODAL_PROXY_KEY": "a"})


def test_a_url_without_a_scheme() -> None:
    with pytest.raises(RolloutError, match="http://"):
        TokasaurusClient("localhost:10210")


def test_connections_are_reused(script: Script) -> None:
    connections: set[Any] = set()

    def remember(handler: BaseHTTPRequestHandler) -> None:
        connections.add(handler.client_address)
        script.ok()(handler)

    script.steps = [remember]

    async def run() -> None:
        async with TokasaurusClient(script.url, replace(FAST, max_connections=4)) as client:
            for _ in range(3):
                await asyncio.gather(*(client.complete([1], 4, 0.7) for _ in range(8)))

    asyncio.run(run())
    assert len(script.requests) == 24 and len(connections) <= 4


def test_a_proxy_of_the_environment_is_asked(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.steps = [script.ok()]
    monkeypatch.setenv("http_proxy", script.url)
    assert ask("http://far-away.invalid:10210") == [GOOD]
    assert script.requests[0][0] == "http://far-away.invalid:10210/custom/cartridge/completions"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert ask(script.url) == [GOOD]
    assert script.requests[1][0] == "/custom/cartridge/completions"


def test_a_body_that_is_sent_again_begins_anew(script: Script) -> None:
    """By the client's own attempts, and by aiohttp where a kept connection had been closed."""

    def closes_after(handler: BaseHTTPRequestHandler) -> None:
        script.ok(b"{}")(handler)
        handler.close_connection = True

    async def content() -> AsyncIterator[bytes]:
        yield b'"ab'
        yield b'cd"'

    async def run() -> None:
        http = RetryingHttp(script.url, FAST)
        for _ in range(2):
            await http.json("POST", "/up", content=content, headers={"Content-Length": "6"})
        await http.close()

    script.steps = [closes_after, script.status(503), closes_after]
    asyncio.run(run())
    assert [body for _, _, body in script.requests] == ["abcd"] * 3
