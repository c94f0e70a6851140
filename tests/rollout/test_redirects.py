"""Credentials, prompts and weights stay with the server that was asked: two real servers.

The first answers with a redirect to the second, which must never be asked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from cartridge_distill.cli.doctor import Finding
from cartridge_distill.cli.doctor import _server as doctors_look
from cartridge_distill.data.documents.source import load_sources
from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.fingerprint import Completion, encode_fingerprint
from cartridge_distill.rollout.http import ClientSettings
from cartridge_distill.sync.http import HttpPublisher
from cartridge_distill.util.errors import ConfigError, RolloutError, SyncError
from tests.cartridge.formats.made import stored
from tests.two_servers import Answer, Asked, TestServer, ok, serving

FAST = ClientSettings(
    max_attempts=2, backoff_s=0.01, max_backoff_s=0.02, startup_timeout_s=2.0, read_timeout_s=5.0
)
SECRETS = {
    "TOKASAURUS_API_KEY": "hush-bearer-token",
    "MODAL_PROXY_KEY": "hush-modal-key",
    "MODAL_PROXY_SECRET": "hush-modal-secret",
}
STATUSES = [301, 302, 303, 307, 308]


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def elsewhere() -> Iterator[TestServer]:
    with serving() as server:
        yield server


def complete(url: str) -> list[Completion]:
    async def run() -> list[Completion]:
        async with TokasaurusClient(url, FAST) as client:
            return await client.complete([1, 2], 4, 0.7)

    return asyncio.run(run())


def wait(url: str) -> None:
    async def run() -> None:
        async with TokasaurusClient(url, FAST) as client:
            await client.wait_until_ready()

    asyncio.run(run())


def publish(url: str) -> None:
    HttpPublisher([url], "owner/tiny", FAST).publish("run-step-000001", stored().snapshot)


def redirecting(status: int, to: str, only: str | None = None) -> Callable[[Asked], Answer]:
    def answers(asked: Asked) -> Answer:
        return (
            (status, {"Location": to + asked.path}, b"")
            if only in (None, asked.method)
            else ok(asked)
        )

    return answers


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize(
    ("ask", "method", "kind"),
    [(complete, "POST", RolloutError), (wait, "GET", RolloutError), (publish, "PUT", SyncError)],
)
def test_another_server_is_never_asked(
    status: int,
    ask: Callable[[str], Any],
    method: str,
    kind: type[Exception],
    elsewhere: TestServer,
) -> None:
    with serving(redirecting(status, elsewhere.url, only=method)) as server:
        with pytest.raises(kind, match="another host, port or scheme") as failure:
            ask(server.url)
    assert elsewhere.asked == []
    # By name, once, and without what was not to be told.
    assert elsewhere.url in str(failure.value) and server.url in str(failure.value)
    assert not any(secret in str(failure.value) for secret in SECRETS.values())
    assert [asked.method for asked in server.asked].count(method) == 1


@pytest.mark.parametrize(
    "target", ["https", "localhost", "a user", "userinfo", "no port", "no address"]
)
def test_other_spellings_of_elsewhere(target: str, elsewhere: TestServer) -> None:
    with serving() as server:
        port = server.url.rpartition(":")[2]
        to = {
            "https": server.url.replace("http:", "https:"),
            "localhost": f"http://localhost:{port}",
            "a user": f"http://hush-user:hush-password@127.0.0.1:{port}",
            "userinfo": server.url + "@" + elsewhere.url.removeprefix("http://"),
            "no port": "//127.0.0.1",
            "no address": "http://[::1",
        }[target]
        server.answers = redirecting(307, to)
        with pytest.raises(RolloutError, match="redirect") as failure:
            complete(server.url)
        assert len(server.asked) == 1 and elsewhere.asked == []
    assert "hush" not in str(failure.value)


def test_the_same_server_is_followed_where_that_is_safe() -> None:
    """303 without the body, 307 and 308 with it; 301 and 302 would lose it on the way."""
    body = {
        "id": "x",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "text": "", "finish_reason": "length"}],
        "system_fingerprint": encode_fingerprint([Completion([5] * 4, [-1.0] * 4, "length")], True),
    }
    with serving() as server:
        for status, method in ((303, "GET"), (307, "POST"), (308, "POST")):
            server.asked.clear()

            def answers(asked: Asked, status: int = status) -> Answer:
                if asked.path.startswith("/there"):
                    return 200, {}, json.dumps(body).encode()
                return status, {"Location": "/there?a=%20b"}, b""

            server.answers = answers
            [completion] = complete(server.url)
            assert completion.token_ids == [5] * 4
            first, last = server.asked
            assert (last.method, last.path) == (method, "/there?a=%20b")
            assert last.headers["Authorization"] == "Bearer hush-bearer-token"
            assert last.body == (b"" if method == "GET" else first.body)
        for status in (301, 302):
            server.asked.clear()
            server.answers = lambda asked, status=status: (status, {"Location": "/there"}, b"")
            with pytest.raises(RolloutError, match="whether the body goes along"):
                complete(server.url)
            assert len(server.asked) == 1


def test_a_second_redirect_leads_no_further(elsewhere: TestServer) -> None:
    def answers(asked: Asked) -> Answer:
        to = "/again" if asked.path != "/again" else elsewhere.url
        return 307, {"Location": to}, b""

    with serving(answers) as server, pytest.raises(RolloutError, match="another host"):
        complete(server.url)
    assert len(server.asked) == 2 and elsewhere.asked == []


def test_a_redirect_without_an_address_is_a_refusal() -> None:
    with serving(lambda _: (302, {}, b"")) as server:
        with pytest.raises(RolloutError, match="refused with HTTP 302"):
            complete(server.url)


def test_an_upload_is_sent_again_whole_on_the_same_server() -> None:
    def answers(asked: Asked) -> Answer:
        if asked.method == "PUT" and not asked.path.endswith("/"):
            return 307, {"Location": asked.path + "/"}, b""
        return ok(asked)

    with serving(answers) as server:
        publish(server.url)
    first, last = (asked for asked in server.asked if asked.method == "PUT")
    assert first.body == last.body and len(last.body) > 1000


def test_doctor_names_the_redirect(elsewhere: TestServer) -> None:
    with serving(redirecting(307, elsewhere.url)) as server:
        found: Finding = doctors_look(server.url)
    assert found.good is False and "another host, port or scheme" in found.said
    assert elsewhere.asked == []


def test_a_password_of_the_data_stays_with_its_server(elsewhere: TestServer) -> None:
    """Documents may lie elsewhere than their URL says; a password is for one server alone."""
    elsewhere.answers = lambda _: (200, {}, b"{}")
    with serving(lambda asked: (302, {"Location": elsewhere.url + "/data"}, b"")) as server:
        lines: list[str] = []
        with pytest.raises(ConfigError, match="redirects to") as failure:
            secret = server.url.replace("http://", "http://anna:hush@")
            load_sources(secret + "/data?sig=hush", lines.append)
        assert elsewhere.asked == []
        assert "hush" not in str(failure.value) + "".join(lines)
        assert "Authorization" in server.asked[0].headers
        with pytest.raises(ConfigError):  # read, and no records
            load_sources(server.url + "/data", lines.append)
        assert len(elsewhere.asked) == 1


def test_an_answer_without_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cartridge_distill.rollout.http._LARGEST_ANSWER", 2**16)
    with serving(lambda _: (200, {}, b" " * 2**20)) as server:
        with pytest.raises(RolloutError, match="over 65536 bytes"):
            complete(server.url)


@pytest.mark.parametrize(
    "body",
    [b"[" * 200_000, b'{"a": ' * 100_000, b"1" * 10_000, b'{"detail": "\\ud800"}', b"\xff" * 9],
)
@pytest.mark.parametrize("status", [200, 400, 503])
def test_hostile_json_ends_in_words(body: bytes, status: int) -> None:
    with serving(lambda _: (status, {}, body)) as server:
        with pytest.raises(RolloutError) as failure:
            complete(server.url)
    str(failure.value).encode()


def test_hostile_json_inside_the_fingerprint_ends_in_words() -> None:
    for fingerprint in ("[" * 200_000, "1" * 10_000, '{"completion_ids": [[1e400]]}'):
        choice = {"index": 0, "text": "", "finish_reason": "stop"}
        body = {"id": "", "created": 1, "model": "", "choices": [choice]}
        whole = json.dumps(body | {"system_fingerprint": fingerprint}).encode()
        with serving(lambda _, whole=whole: (200, {}, whole)) as server:
            with pytest.raises(RolloutError):
                complete(server.url)


def test_what_is_no_http_is_tried_again_and_then_named() -> None:
    import socketserver
    import threading

    class Garbage(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4096)
            self.request.sendall(b"\x00\x01 no HTTP\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Garbage) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        with pytest.raises(RolloutError, match="failed 2 times"):
            complete(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
        thread.join(10)


def test_a_credential_that_no_header_can_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("hush\n", "hu sh", "h\u00fcsh"):
        monkeypatch.setenv("TOKASAURUS_API_KEY", value)
        with pytest.raises(RolloutError, match="TOKASAURUS_API_KEY holds a blank") as failure:
            TokasaurusClient("http://127.0.0.1:1", replace(FAST))
        assert value.strip() not in str(failure.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://anna:hush@127.0.0.1:1",
        "http://hush@127.0.0.1:1",
        "http://anna:hu/sh@127.0.0.1:1",
        "http://anna:hu?sh@127.0.0.1:1",
        "http://anna:hu#sh@127.0.0.1:1",
        "http://anna:hu[sh@127.0.0.1:1",
        "anna:hush@127.0.0.1:1",
        "https://127.0.0.1:1?token=hush",
        "https://127.0.0.1:1/x#hush",
    ],
)
def test_a_url_with_a_secret_is_refused_and_never_shown(url: str) -> None:
    for refuse in (
        lambda: TokasaurusClient(url),
        lambda: HttpPublisher([url], "m"),
    ):
        with pytest.raises((RolloutError, ConfigError), match=r"127\.0\.0\.1:1") as failure:
            refuse()
        for part in ("hush", "anna", "sh@", "hu/"):
            assert part not in str(failure.value)
