"""More connections than a server has places for, against a real uvicorn."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import uvicorn
from fastapi import FastAPI

from cartridge_distill.util.http_connections import uvicorn_options
from cartridge_distill.util.http_errors import protect
from cartridge_distill.util.http_places import Places
from tests.gateway.rig import until

PLACES = 20
GET = b"GET /quick HTTP/1.1\r\nHost: x\r\n\r\n"
Address = tuple[str, int]


class Served:
    """A server with few places, and requests that it answers when it is told to."""

    def __init__(self) -> None:
        self.app = FastAPI()
        protect(self.app, idle_s=300.0)
        self.go_on = threading.Event()
        self.held = 0

        @self.app.get("/quick")
        async def quick() -> dict[str, int]:
            return {"held": self.held}

        @self.app.get("/held")
        async def hold() -> dict[str, int]:
            self.held += 1
            while not self.go_on.is_set():
                await asyncio.sleep(0.01)
            self.held -= 1
            return {}

        @self.app.post("/json")
        async def take_json(body: dict[str, int]) -> dict[str, int]:
            return body

    @contextmanager
    def running(self) -> Iterator[tuple[uvicorn.Server, Address]]:
        options = uvicorn_options(300.0, max_connections=PLACES)
        server = uvicorn.Server(uvicorn.Config(self.app, log_level="critical", **options))
        listener = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started, "the server has started")
            yield server, listener.getsockname()
        finally:
            self.go_on.set()
            server.should_exit = True
            thread.join(30)


def connect(address: Address, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(address, timeout=30)
    connection.sendall(sent)
    return connection


def answer(connection: socket.socket) -> bytes:
    """Until an answer is there, whose body ends with a brace, or the connection ends."""
    came = b""
    while not came.endswith(b"}") and (chunk := connection.recv(2**16)):
        came += chunk
    return came


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET /quick HTTP/1.1\r\nHost: ",
        b'POST /json HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"a":',
        GET,  # and then the connection is kept
    ],
)
def test_silent_connections_do_not_shut_others_out(said: bytes) -> None:
    served = Served()
    with served.running() as (server, address), ExitStack() as open_ones:
        silent = [open_ones.enter_context(connect(address, said)) for _ in range(5 * PLACES)]
        with connect(address, GET) as asking:
            assert answer(asking).startswith(b"HTTP/1.1 200")
            until(lambda: len(server.server_state.connections) <= PLACES, "the others are gone")
            # The newest stayed: the one that asked, and those before it.
            asking.sendall(GET)
            assert answer(asking).startswith(b"HTTP/1.1 200")
        del silent


def test_what_is_being_answered_stays_and_a_newcomer_is_told() -> None:
    served = Served()
    held = b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n"
    with served.running() as (server, address), ExitStack() as open_ones:
        asking = [open_ones.enter_context(connect(address, held)) for _ in range(PLACES)]
        until(lambda: served.held == PLACES, "all places are taken")
        # Also one that sends a body which nobody reads.
        for sent in (GET, b"POST /json HTTP/1.1\r\nContent-Length: 9\r\n\r\n" + bytes(10**5)):
            with connect(address) as late:
                late.sendall(sent)
                came = answer(late)
            head, _, body = came.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in head
            assert b"connection: close" in head and "in use" in json.loads(body)["detail"]
        crowd = [open_ones.enter_context(connect(address)) for _ in range(5 * PLACES)]
        until(lambda: len(server.server_state.connections) <= 2 * PLACES, "few are told why")
        del crowd
        served.go_on.set()
        assert all(answer(one).startswith(b"HTTP/1.1 200") for one in asking)
        with connect(address, GET) as again:
            assert answer(again).startswith(b"HTTP/1.1 200")


class Noted:
    gave_way = False

    def give_way(self) -> None:
        self.gave_way = True


def test_the_one_that_was_silent_for_longest_goes() -> None:
    places, first, second, third, fourth = Places(2), Noted(), Noted(), Noted(), Noted()
    assert places.enter(first) and places.enter(second)
    places.heard(first)
    assert places.enter(third)
    assert (first.gave_way, second.gave_way, third.gave_way) == (False, True, False)
    places.served(first)
    places.served(third)
    assert not places.enter(fourth)
    places.answered(third)
    assert places.enter(fourth) and third.gave_way and not first.gave_way
    for one in (first, fourth):
        places.leave(one)
    assert len(places) == 0


_LIMIT = """
import resource, sys
soft, hard, asked = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
from cartridge_distill.util.http_places import possible
print(possible(asked), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "places", "files"),
    [(256, 4096, 2048, 2432), (256, 1000, 775, 1000), (64, 64, 16, 64)],
)
def test_places_follow_from_the_files_that_the_system_allows(
    soft: int, hard: int, places: int, files: int
) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < hard:
        pytest.skip("the system allows fewer")
    done = subprocess.run(
        [sys.executable, "-c", _LIMIT, str(soft), str(hard), "2048"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert list(map(int, done.stdout.split())) == [places, files]
