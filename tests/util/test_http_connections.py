"""Clients that died, or never meant to speak, against a real uvicorn: none of them stays."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

from cartridge_distill.util.http_connections import uvicorn_options
from cartridge_distill.util.http_errors import add_refusals, protect
from tests.gateway.rig import until

IDLE = 0.5


def make_app() -> FastAPI:
    app = FastAPI()
    protect(app, IDLE, lambda _method, _path: 10**6)
    add_refusals(app)

    @app.post("/json")
    async def take_json(body: dict[str, int]) -> dict[str, int]:
        return body

    @app.put("/stream")
    async def take_stream(http: Request) -> dict[str, int]:
        return {"came": sum([len(chunk) async for chunk in http.stream()])}

    @app.put("/early")
    async def answer_early() -> dict[str, str]:
        return {"read": "nothing"}

    @app.get("/slow")
    async def slow() -> dict[str, str]:
        await asyncio.sleep(3 * IDLE)  # a server that takes its time is no dead client
        return {"took": "its time"}

    @app.get("/large")
    async def large() -> StreamingResponse:
        async def pieces():  # type: ignore[no-untyped-def]
            for _ in range(2000):
                yield bytes(2**16)

        return StreamingResponse(pieces())

    @app.get("/broken")
    async def broken() -> Response:
        raise RuntimeError("nobody foresaw this")

    return app


@contextmanager
def running(app: FastAPI) -> Iterator[tuple[uvicorn.Server, tuple[str, int]]]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", **uvicorn_options(IDLE)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started, "the server has started")
        yield server, listener.getsockname()
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[uvicorn.Server, tuple[str, int]]]:
    with running(make_app()) as made:
        yield made


Served = tuple[uvicorn.Server, tuple[str, int]]


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    connection.settimeout(30)
    came = b""
    while chunk := connection.recv(2**16):
        came += chunk
    return came


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"\r\n",
        b"GET",
        b"GET /slow HTTP/1.1\r\nHost: x\r\nX-Half: ",
        b"POST /json HTTP/1.1\r\nHost: x\r\n",
    ],
)
def test_a_head_that_does_not_come_ends_the_connection(served: Served, beginning: bytes) -> None:
    with socket.create_connection(served[1]) as connection:
        connection.sendall(beginning)
        assert answer_or_reset(connection) == b""


def answer_or_reset(connection: socket.socket) -> bytes:
    try:
        return answer(connection)
    except ConnectionResetError:
        return b""


def test_two_hundred_silent_connections_do_not_stay(served: Served) -> None:
    server, address = served
    silent = [socket.create_connection(address) for _ in range(200)]
    try:
        until(lambda: len(server.server_state.connections) >= 200, "they are there")
        until(lambda: not server.server_state.connections, "they are gone")
    finally:
        for connection in silent:
            connection.close()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", ["POST /json", "PUT /stream"])
def test_a_body_that_stops_is_a_408_that_closes(served: Served, path: str, chunked: bool) -> None:
    size = "Transfer-Encoding: chunked" if chunked else "Content-Length: 1000"
    head = f"{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{size}\r\n\r\n"
    with socket.create_connection(served[1]) as connection:
        connection.sendall(head.encode() + (b"5\r\n" if chunked else b"") + b'{"a":')
        came = answer(connection)
    assert came.startswith(b"HTTP/1.1 408") and b"connection: close" in came
    assert b"5 bytes in" in came


def test_a_body_that_trickles_is_cut_off_too(served: Served) -> None:
    head = b"PUT /stream HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
    stop = threading.Event()
    with socket.create_connection(served[1]) as connection:
        connection.sendall(head)

        def trickle() -> None:  # never silent for as long as is allowed
            while not stop.wait(IDLE / 10):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            came = answer_or_reset(connection)
        finally:
            stop.set()
            thread.join()
    assert came == b"" or came.startswith(b"HTTP/1.1 408")


def test_a_head_of_any_length_is_not_read(served: Served) -> None:
    with socket.create_connection(served[1]) as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n")
        try:
            for number in range(100_000):
                connection.sendall(b"X-%d: %s\r\n" % (number, b"y" * 1000))
        except OSError:
            pass
        else:
            pytest.fail("100 MB of headers were taken")


def test_a_client_that_does_not_read_its_answer_is_cut_off(served: Served) -> None:
    server, address = served
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: server.server_state.tasks, "the answer is under way")
        until(lambda: not server.server_state.tasks, "it was given up")
        until(lambda: not server.server_state.connections, "the connection is gone")


def test_a_slow_server_and_a_waiting_client_are_left_alone(served: Served) -> None:
    with socket.create_connection(served[1]) as connection:
        for _ in range(2):  # on one connection
            connection.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            came = b""
            while b"its time" not in came:
                came += connection.recv(2**16)
            assert came.startswith(b"HTTP/1.1 200") and b"close" not in came


def test_a_body_that_nobody_reads_does_not_hold_the_connection(served: Served) -> None:
    head = b"PUT /early HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(served[1]) as connection:
        connection.sendall(head + b"half")
        assert answer_or_reset(connection).startswith(b"HTTP/1.1 200")
    # and one that comes whole leaves the connection usable
    with socket.create_connection(served[1]) as connection:
        for _ in range(2):
            connection.sendall(head + bytes(1000))
            came = b""
            while b"nothing" not in came:
                came += connection.recv(2**16)
            assert came.startswith(b"HTTP/1.1 200")


def test_what_nobody_foresaw_says_that_the_connection_ends(served: Served) -> None:
    with socket.create_connection(served[1]) as connection:
        connection.sendall(b"GET /broken HTTP/1.1\r\nHost: x\r\n\r\n")
        came = answer(connection)
    assert came.startswith(b"HTTP/1.1 500") and b"connection: close" in came
    assert b"nobody foresaw" not in came


@pytest.mark.parametrize(
    ("size", "status"),
    [
        (b"Content-Length: 1000001", b"413"),
        (b"Content-Length: " + b"9" * 18, b"413"),
        (b"Content-Length: 3\r\nContent-Length: 3", b"400"),
        (b"Content-Length: -1", b"400"),
        (b"Content-Length: 0x10", b"400"),
        (b"Content-Length: 3\r\nTransfer-Encoding: chunked", b"400"),
        (b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x", b"2"),
    ],
)
def test_sizes_that_will_not_do(served: Served, size: bytes, status: bytes) -> None:
    with socket.create_connection(served[1]) as connection:
        connection.sendall(b"PUT /stream HTTP/1.1\r\nHost: x\r\n" + size + b"\r\n\r\nabc")
        came = answer_or_reset(connection)
    assert came.startswith(b"HTTP/1.1 " + status) and b"connection: close" in came.lower(), came
