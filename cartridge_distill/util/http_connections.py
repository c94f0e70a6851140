"""Connections that do not wait for ever: uvicorn's protocol with a limit on what a client may take.

uvicorn closes a connection that is idle *between* requests. It waits without a limit for the first
byte of a new connection, for the rest of a request's head, for what is left of a body that nobody
reads any more, and for a client that does not read its answer; and a head may have any length. A
process has some thousand connections, so clients that died, or never meant to speak, would end it.

How many connections there may be is bounded too, see ``http_places``. Bodies of requests that are
being served are bounded in ``http_front``.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cartridge_distill.util.http_front import IDLE_SECONDS
from cartridge_distill.util.http_places import (
    MAX_CONNECTIONS,
    OTHER_FILES,
    REFUSAL,
    Places,
    possible,
)

KEEP_ALIVE_SECONDS = 75
"""Between two requests: longer than a training step's pause between rollouts, mostly."""
MAX_HEAD_BYTES = 2**16
_READS_REFUSAL_SECONDS = 1.0
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


def uvicorn_options(
    idle_s: float = IDLE_SECONDS,
    max_connections: int = MAX_CONNECTIONS,
    other_files: int = OTHER_FILES,
) -> dict[str, Any]:
    """Arguments of ``uvicorn.Config`` (and ``uvicorn.run``) for a server with these limits.

    Args:
        idle_s: how long a client may be silent in the middle of a request.
        max_connections: open at once.
        other_files: descriptors that this process needs beside them.
    """
    places = Places(possible(max_connections, other_files))
    kind = type("PatientProtocol", (PatientProtocol,), {"idle_s": idle_s, "places": places})
    # No path speaks websockets; uvicorn would answer an attempt with a 500.
    return {"http": kind, "ws": "none", "timeout_keep_alive": KEEP_ALIVE_SECONDS}


class PatientProtocol(HttpToolsProtocol):
    """One connection."""

    idle_s = IDLE_SECONDS
    places = Places(MAX_CONNECTIONS)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._waiting: asyncio.TimerHandle | None = None  # for the client to send
        self._writing: asyncio.TimerHandle | None = None  # until it reads
        self._in_head = self._in_body = False
        self._head_bytes = 0
        self._is_refused = False

    # --- what comes ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.places.enter(self):
            self._wait()
            return
        self._is_refused = True
        if not self.places.may_be_told(self):
            self.transport.abort()
            return
        # With its end, and not closed: what the client has sent, and nobody reads, would make the
        # system throw the answer away.
        self.transport.write(REFUSAL)
        self.transport.write_eof()
        self._waiting = self.loop.call_later(_READS_REFUSAL_SECONDS, self.transport.abort)

    def give_way(self) -> None:
        """Its place is another's."""
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self.places.heard(self)
        was_in_head = self._in_head
        super().data_received(data)
        if self._in_head and was_in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.write(_TOO_LARGE)
                self.transport.close()
                return
        is_served = self.cycle is not None and not self.cycle.response_complete
        if is_served:
            self._wait_no_more()
        elif self._in_body or self._waiting is None:
            # A head must come whole in this time; of a body that nobody reads each part.
            self._wait()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._in_head, self._in_body = False, True
        if self.parser.should_upgrade():
            # To another protocol, which nobody speaks here; the parser reads no further request.
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_body = False
        if self.cycle is not None and not self.cycle.response_complete:
            self.places.served(self)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle is None or self.cycle.response_complete:  # else it is that of the next one
            self.places.answered(self)
        if (self._in_body or self._in_head) and not self.transport.is_closing():
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        self._stop_watching_writes()
        self.places.leave(self)
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._wait_no_more()
        self._waiting = self.loop.call_later(self.idle_s, self.transport.abort)

    def _wait_no_more(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    # --- what goes ----------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writes(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_watching_writes()

    def _watch_writes(self, unread: int) -> None:
        """Looks again after a while whether the client has read anything of what is written."""

        def look() -> None:
            left = self.transport.get_write_buffer_size()
            if left >= unread:
                self.transport.abort()
            else:
                self._watch_writes(left)

        self._writing = self.loop.call_later(self.idle_s, look)

    def _stop_watching_writes(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
