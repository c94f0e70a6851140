"""What a client may try, with the token and without: refused, told, and nobody else's trouble."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import aiohttp
import httpx
import pytest

from cartridge_distill.gateway.metrics import Metrics
from cartridge_distill.gateway.process import ServerProcess
from cartridge_distill.gateway.settings import GatewaySettings
from tests.gateway.rig import COMPLETIONS, TOKEN, Rig, completion, upload_bytes

pytestmark = pytest.mark.integration
RIGHT = f"Authorization: Bearer {TOKEN}"
WRONG = "Authorization: Bearer wrong-wrong-wrong-wrong"
HOSTS = ("[", "[::1", "]", "@", "a:b:c", "\xff", "x/y", "?", "")
PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    COMPLETIONS,
    "/custom/cartridge/chat/completions",
)


def ask(rig: Rig, lines: list[str], body: bytes = b"") -> bytes:
    """What comes for a request that is written by hand, until the gateway closes."""
    host, port = rig.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        connection.shutdown(socket.SHUT_WR)
        came = b""
        while chunk := connection.recv(2**16):
            came += chunk
        return came


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([RIGHT], b"200"),
        ([WRONG, RIGHT], b"401"),
        ([RIGHT, WRONG], b"401"),
        ([RIGHT, RIGHT], b"401"),
        (["Authorization:", RIGHT], b"401"),
        ([f"{WRONG}, Bearer {TOKEN}"], b"401"),
        ([RIGHT.replace("Authorization", "authorization")], b"200"),
        ([f"{RIGHT}\x00"], b"400"),
        ([f"{RIGHT}\xff"], b"401"),
    ],
)
def test_one_authorization_header_and_the_right_one(
    rig: Rig, headers: list[str], status: bytes
) -> None:
    came = ask(rig, ["GET /cartridges HTTP/1.1", "Host: localhost", "Connection: close", *headers])
    assert came.startswith(b"HTTP/1.1 " + status), came
    assert TOKEN.encode() not in came and TOKEN not in rig.log


@pytest.mark.parametrize(
    "fields",
    [
        '"n": NaN',
        '"temperature": Infinity',
        '"temperature": 1e400',
        '"seed": 1e400',
        '"user": "\\ud800"',
        '"model": "\\udfff", "surprise": 1',
        '"n": 1, "n": 5',
        '"metadata": ' + "[" * 9000,
        '"cartridges": [{"id": "\\ud800", "source": "local"}]',
        '"surprise": 1e999',
        '"stop": [NaN]',
    ],
)
def test_no_json_that_has_no_meaning(rig: Rig, fields: str) -> None:
    for path in PATHS:
        prompt = '"messages": []' if "chat" in path else '"prompt": [1]'
        body = f'{{"model": "m", {prompt}, "max_tokens": 1, {fields}}}'.encode()
        answer = rig.http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422), (path, answer.text)
        assert len(answer.text) < 500
    assert "Traceback" not in rig.log


def test_nonsense_does_not_come_back(rig: Rig) -> None:
    body = completion() | {"surprise": ["nonsense"] * 1500}
    for change in (body, completion() | {"prompt": ["nonsense", {}] * 700}):
        answer = rig.http.post(COMPLETIONS, json=change)
        assert answer.status_code == 422
        assert len(answer.text) < 500 and "nonsense" not in answer.text
    long = rig.complete("x" * 3000)
    assert long.status_code == 404 and len(long.text) < 1000
    answer = rig.http.get("/cartridges/" + "y" * 2000)
    assert answer.status_code == 422 and len(answer.text) < 500


@pytest.mark.parametrize(
    "change",
    [
        {"n": 10**7},
        {"stop": ["x"] * 17},
        {"stop": ["x" * 5000]},
        {"cartridges": [{"id": "a", "source": "local"}] * 17},
        {"max_tokens": 10**30},
    ],
)
def test_bounds_hold_before_the_server(rig: Rig, change: dict[str, Any]) -> None:
    assert rig.http.post(COMPLETIONS, json=completion() | change).status_code == 422


def test_no_template_of_a_client(rig: Rig) -> None:
    loop = {"chat_template": "{% for i in range(10**9) %}{% endfor %}"}
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    answer = rig.http.post(PATHS[3], json=body | {"apply_chat_template_overrides": loop})
    assert answer.status_code == 422 and "chat_template" in answer.json()["detail"]


@pytest.mark.parametrize(
    "lines",
    [
        ["PUT /cartridges/x HTTP/1.1", "Host: x", RIGHT, "Content-Length: " + "9" * 30],
        ["PUT /cartridges/x HTTP/1.1", "Host: x", RIGHT, "Content-Length: 1e3"],
        ["GET /cartridges/%ED%A0%80 HTTP/1.1", "Host: x", RIGHT],
        ["GET /cartridges/\xff HTTP/1.1", "Host: x", RIGHT],
        ["GET /cartridges?%ED%A0%80=\xe9 HTTP/1.1", "Host: x", RIGHT],
        ["GET /cartridges/?\xff HTTP/1.1", "Host: x", RIGHT],
        ["GET /%2e%2e/%00 HTTP/1.1", "Host: x", RIGHT],
        ["GET http://[::1/ HTTP/1.1", "Host: x", RIGHT],
        ["CONNECT x:1 HTTP/1.1", "Host: x", RIGHT],
        ["OPTIONS * HTTP/1.1", "Host: x", RIGHT],
        ["TRACE /ping HTTP/1.1", "Host: x"],
        ["GET /ping HTTP/9.9", "Host: x"],
        ["GET /ping HTTP/1.1", "Host: x", "Upgrade: websocket", "Connection: upgrade"],
        ["POST /v1/completions HTTP/1.1", "Host: x", RIGHT, "Content-Type: \xff/json; a=\xfe"],
        ["POST /v1/completions HTTP/1.1", "Host: x", RIGHT, "Transfer-Encoding: gzip"],
        ["nonsense"],
        *([f"GET /v1/{host} HTTP/1.1", f"Host: {host}", RIGHT] for host in HOSTS),
        *(["POST /v1/completions HTTP/1.1", f"Host: {host}", RIGHT] for host in HOSTS),
    ],
)
def test_heads_that_make_no_sense(rig: Rig, lines: list[str]) -> None:
    came = ask(rig, lines)
    assert not came.startswith(b"HTTP/1.1 5"), came
    assert "Traceback" not in rig.log
    assert rig.http.get("/ping").status_code == 200


def test_a_refused_upload_gets_its_answer_although_it_is_still_being_sent(rig: Rig) -> None:
    body = upload_bytes(base_model="other", tokens=64) + bytes(30_000)
    answer = rig.put("late", body)
    assert answer.status_code == 422 and "base_model" in answer.json()["detail"]


# --- connections to the server that are kept --------------------------------------------------


class Closing:
    """An HTTP server that answers the first request of a connection, and ends at the second.

    As one does that closes a kept connection, for its age or after a mistake, in the very moment in
    which the next request is on its way.
    """

    def __init__(self, answers: int) -> None:
        self.answers = answers  # of a connection before it ends
        self.connections = 0  # that brought a POST; the process is also looked at with GET /ping
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            for number in range(self.answers + 1):
                came = b""
                while not came.endswith(b"{}"):
                    chunk = connection.recv(2**16)
                    if not chunk:
                        return
                    came += chunk
                self.connections += number == 0 and came.startswith(b"POST ")
                if number < self.answers:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def closing() -> Iterator[Closing]:
    made = Closing(answers=1)
    yield made
    made.close()


async def process_at(port: int) -> ServerProcess:
    settings = GatewaySettings(model="m", server_port=port)
    process = ServerProcess(lambda _: ["sleep", "60"], {}, settings, Metrics(), lambda _: None)
    await process.start()
    return process


async def test_a_kept_connection_that_was_closed_costs_nobody_an_answer(closing: Closing) -> None:
    process = await process_at(closing.port)
    try:
        for number in range(6):
            async with process.post("/x", b"{}") as response:
                assert (response.status, await response.read()) == (200, b"ok")
            assert closing.connections <= number + 2
    finally:
        await process.stop()
    assert closing.connections >= 4  # kept ones were ended, and others taken


async def test_a_server_that_breaks_off_every_request_is_told(closing: Closing) -> None:
    closing.answers = 0
    process = await process_at(closing.port)
    try:
        with pytest.raises(aiohttp.ClientError):
            async with process.post("/x", b"{}"):
                pass
        await asyncio.sleep(0)
        assert closing.connections == 1  # not asked again and again
    finally:
        await process.stop()


def test_after_mistakes_of_others_requests_are_answered(rig: Rig) -> None:
    """On the real pair: whatever was sent before, the next request gets its answer."""
    bad = [b"{", b'{"n": NaN}', b'{"model": "\\ud800"}']
    for number in range(20):
        content = bad[number % 3]
        rig.http.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
        rig.http.post(COMPLETIONS, json=completion(temperature=1e-300))
        answer: httpx.Response = rig.complete()
        assert answer.status_code == 200, answer.text
