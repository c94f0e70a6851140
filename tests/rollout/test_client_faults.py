"""The client against a real HTTP server on the loopback that misbehaves on purpose.

Every fault ends in a retry that succeeds or in an error that says what happened; none in tokens
that nobody sampled.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.rollout.http import ClientSettings, RetryingHttp, _retry_after, auth_headers
from cartridge_distill.rollout.protocol import CartridgeRef
from cartridge_distill.util.errors import RolloutError, ServerUnreachable

FAST = ClientSettings(
    max_attempts=3,
    backoff_s=0.01,
    max_backoff_s=0.05,
    connect_timeout_s=2.0,
    read_timeout_s=5.0,
    startup_timeout_s=5.0,
)
GOOD = Completion([5, 6], [-0.5, -1.5], "stop")


def floats(*values: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def answer(ids: Any = None, logprobs: list[float] | None = None, **changes: Any) -> bytes:
    fingerprint = {
        "completion_ids": [[5, 6]] if ids is None else ids,
        "packed_chosen_logprobs": [floats(*([-0.5, -1.5] if logprobs is None else logprobs))],
        "packed_topk_indices": None,
        "packed_topk_logprobs": None,
    }
    body = {
        "id": "x",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "text": "a", "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        "system_fingerprint": json.dumps(fingerprint),
    }
    return json.dumps(body | changes).encode()


class Script:
    """What the server does with its first, second, ... request; the last entry repeats."""

    def __init__(self) -> None:
        self.steps: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.url = ""
        self.over = threading.Event()

    def play(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        body = json.loads(handler.rfile.read(length)) if length else None
        self.requests.append((handler.path, dict(handler.headers), body))
        self.steps[min(len(self.requests), len(self.steps)) - 1](handler)

    def status(
        self, code: int, body: bytes = b'{"detail": "out of order"}', **headers: str
    ) -> Callable[[BaseHTTPRequestHandler], None]:
        def act(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(code)
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)

        return act

    def ok(self, body: bytes | None = None) -> Callable[[BaseHTTPRequestHandler], None]:
        return self.status(200, answer() if body is None else body)

    def hang(self, handler: BaseHTTPRequestHandler) -> None:
        self.over.wait(30)
        handler.close_connection = True

    def cut(self, handler: BaseHTTPRequestHandler) -> None:
        """Promises more bytes than it sends, then closes."""
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(answer())))
        handler.end_headers()
        handler.wfile.write(answer()[:100])
        handler.close_connection = True

    def drop(self, handler: BaseHTTPRequestHandler) -> None:
        """Closes without a word."""
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def script() -> Iterator[Script]:
    made = Script()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            made.play(self)

        def do_GET(self) -> None:
            made.play(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.over.set()
    server.shutdown()
    server.server_close()
    thread.join(10)


def ask(url: str, settings: ClientSettings = FAST, n: int = 1) -> list[Completion]:
    async def run() -> list[Completion]:
        async with TokasaurusClient(url, settings, vocab_size=100) as client:
            refs = [CartridgeRef(id="v1", source="local")]
            return await client.complete([1, 2], 4, 0.7, refs, n=n)

    return asyncio.run(run())


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_request_as_sent(script: Script) -> None:
    script.steps = [script.ok()]
    assert ask(script.url + "/") == [GOOD]
    [(path, _, body)] = script.requests
    assert path == "/custom/cartridge/completions"
    assert body == {
        "model": "default",
        "prompt": [1, 2],
        "max_tokens": 4,
        "temperature": 0.7,
        "n": 1,
        "cartridges": [{"id": "v1", "source": "local"}],
        "logprobs_in_fingerprint": True,
    }


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_what_can_pass_is_tried_again(script: Script, code: int) -> None:
    script.steps = [script.status(code), script.ok()]
    assert ask(script.url) == [GOOD]
    assert len(script.requests) == 2


def test_always_500_ends_after_the_attempts_allowed(script: Script) -> None:
    script.steps = [script.status(500)]
    with pytest.raises(RolloutError, match=r"failed 3 times.*HTTP 500: out of order"):
        ask(script.url)
    assert len(script.requests) == 3


@pytest.mark.parametrize("code", [400, 401, 403, 404, 409, 413, 422])
def test_what_cannot_pass_is_not_tried_again(script: Script, code: int) -> None:
    script.steps = [script.status(code, b'{"detail": "prompt over the limit of 64"}'), script.ok()]
    with pytest.raises(RolloutError, match=f"HTTP {code}: prompt over the limit of 64"):
        ask(script.url)
    assert len(script.requests) == 1


def test_a_server_that_hangs(script: Script) -> None:
    script.steps = [script.hang]
    quick = replace(FAST, read_timeout_s=0.1, max_attempts=2)
    with pytest.raises(RolloutError, match=r"failed 2 times.*SocketTimeoutError"):
        ask(script.url, quick)
    script.requests.clear()
    script.steps = [script.hang, script.ok()]
    assert ask(script.url, replace(quick, read_timeout_s=1.0)) == [GOOD]


@pytest.mark.parametrize("fault", ["cut", "drop"])
def test_a_connection_that_breaks(script: Script, fault: str) -> None:
    script.steps = [getattr(script, fault), script.ok()]
    assert ask(script.url) == [GOOD]
    script.steps = [getattr(script, fault)]
    named = {"cut": "ClientPayloadError", "drop": "ServerDisconnectedError"}[fault]
    with pytest.raises(RolloutError, match=f"failed 3 times.*{named}"):
        ask(script.url)


@pytest.mark.parametrize("body", [answer()[:-30], b"", b"<html>starting</html>", b"\xff\xfe\x00"])
def test_a_body_that_is_not_json(script: Script, body: bytes) -> None:
    script.steps = [script.ok(body), script.ok()]
    assert ask(script.url) == [GOOD]
    script.steps = [script.ok(body)]
    with pytest.raises(RolloutError, match="failed 3 times.*not JSON"):
        ask(script.url)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (answer(logprobs=[-0.5, float("nan")]), "nan"),
        (answer(logprobs=[float("-inf"), -1.0]), "-inf"),
        (answer(logprobs=[0.5, -1.0]), "log-prob 0.5"),
        (answer(ids=[[5, 100]]), "outside the vocabulary of 100"),
        (answer(ids=[[]]), "not a filled list"),
        (answer(ids=[[5, 6], [7, 8]]), "2 entries for 1 choices"),
        (answer(ids=[[1] * 5], logprobs=[-1.0] * 5), "5 tokens, asked for at most 4"),
        (answer(system_fingerprint="fp_1"), "not JSON"),
        (answer(system_fingerprint=None), "system_fingerprint"),
        (answer(choices=[]), "0 choices"),
        (answer(choices=[{"index": 0, "text": "a", "finish_reason": "error"}]), "'error'"),
        (b'{"error": "busy"}', "does not follow the protocol"),
        (b"[]", "does not follow the protocol"),
        (b"null", "does not follow the protocol"),
    ],
)
def test_nonsense_is_an_error_at_once(script: Script, body: bytes, says: str) -> None:
    script.steps = [script.ok(body), script.ok()]
    with pytest.raises(RolloutError, match=says):
        ask(script.url)
    assert len(script.requests) == 1


SHORT = [
    ({"logprobs": [-0.5]}, "stop", "1 log-probs for 2 tokens"),
    ({"logprobs": [-0.5, -1.5, -2.0]}, "stop", "3 log-probs for 2 tokens"),
    ({}, "length", r"2 tokens and finish_reason 'length', which would be 4 tokens"),
    ({"ids": [[5, 6, 7]], "logprobs": [-1.0] * 3}, "length", "3 tokens and finish_reason 'length'"),
    ({}, "stop", r"ends with token 6, which ends no answer of this model \(\[7, 8\] do\)"),
]


@pytest.mark.parametrize(("change", "reason", "says"), SHORT)
def test_a_shortened_answer_is_asked_for_again_and_then_refused(
    script: Script, change: dict[str, Any], reason: str, says: str
) -> None:
    """The reason, the tokens and the log-probs must agree; nothing else would tell."""
    choices = [{"index": 0, "text": "a", "finish_reason": reason, "logprobs": None}]
    short = answer(**change, choices=choices)
    whole = answer([[5, 6, 7]], [-0.5, -1.5, -2.5])

    async def ask_knowing_ends() -> list[Completion]:
        async with TokasaurusClient(script.url, FAST, 100, frozenset({7, 8})) as client:
            return await client.complete([1, 2], 4, 0.7)

    script.steps = [script.ok(short), script.ok(whole)]
    good = Completion([5, 6, 7], [-0.5, -1.5, -2.5], "stop")
    assert asyncio.run(ask_knowing_ends()) == [good]
    script.requests.clear()
    script.steps = [script.ok(short)]
    with pytest.raises(RolloutError, match=f"failed 3 times.*{says}"):
        asyncio.run(ask_knowing_ends())
    assert len(script.requests) == 3


@pytest.mark.parametrize("last", [7, 6])
def test_an_answer_of_full_length_may_end_with_any_token(script: Script, last: int) -> None:
    choices = [{"index": 0, "text": "a", "finish_reason": "length", "logprobs": None}]
    script.steps = [script.ok(answer([[5, 6, 5, last]], [-1.0] * 4, choices=choices))]

    async def run() -> list[Completion]:
        async with TokasaurusClient(script.url, FAST, 100, frozenset({7})) as client:
            return await client.complete([1, 2], 4, 0.7)

    assert asyncio.run(run())[0].token_ids == [5, 6, 5, last]


def test_retry_after_is_honoured(script: Script, caplog: pytest.LogCaptureFixture) -> None:
    script.steps = [script.status(429, Retry_After="1"), script.ok()]
    with caplog.at_level(logging.WARNING):
        assert ask(script.url) == [GOOD]
    # The backoff alone would be some hundredths of a second.
    assert "attempt 1 of 3" in caplog.text and "the next in 1.0 s" in caplog.text


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        *((None, None), ("2.5", 2.5), ("-3", 0.0), ("99999", 60.0), ("soon", None), ("nan", None)),
        *(("1e400", 60.0), ("9" * 5000, 60.0), ("-inf", 0.0), ("", None)),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 60.0),
        ("Wed, 21 Oct 2015 07:28:00 +9999999999", None),
        ("Wed, 99 Oct 99999 07:28:00 GMT", None),
    ],
)
def test_retry_after_values(value: str | None, wanted: float | None) -> None:
    headers = {} if value is None else {"Retry-After": value}
    assert _retry_after(headers) == wanted
    assert _retry_after({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0


def test_connection_refused() -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    with pytest.raises(ServerUnreachable) as failure:
        ask(url)
    for word in (
        url,
        "failed 3 times",
        "ClientConnectorError",
        "python -m cartridge_distill.server",
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
        "python -m cartridge_distill.server",
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
