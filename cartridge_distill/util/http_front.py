"""Before any route: how much a request may bring and how slowly, and no answer without its end.

An answer that is whole gets its hash into a header, see ``content_digest``.

A plain ASGI layer, so that it also holds for bodies that a route streams. What it refuses, and what
a route did not foresee, is answered with ``Connection: close``: the connection cannot be used
again, and a client's pool must know.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cartridge_distill.util.content_digest import HEADER, digest_of

logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 8 * 2**20
"""Body of a request, where nothing else is said: a prompt of a million token ids."""
IDLE_SECONDS = 60.0
"""A client that sends nothing, or reads nothing, for so long is taken for dead."""
MAX_IDLE_SECONDS = 3600.0
SLOWEST_BYTES_PER_S = 2**15
"""A client that sends less, in the mean, would hold its place for hours."""
_DIGEST = HEADER.lower().encode()
ErrorBody = Callable[[str, int, str], Any]
"""From the path, the status and the words of an error to what is sent as JSON."""


def plain_detail(path: str, status: int, words: str) -> dict[str, str]:
    """FastAPI's form of an error."""
    return {"detail": words}


class _Refused(Exception):
    """The body is not read any further."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class Front:
    """Bounds bodies; answers for routes that fail.

    Args:
        app: what is guarded.
        body_limit: bytes a request may bring, by method and path.
        idle_s: how long the next bytes of a body may take. All waiting for a body together may
            take this and what its bytes take at :data:`SLOWEST_BYTES_PER_S`.
        error_body: the form of an error.
    """

    def __init__(
        self,
        app: ASGIApp,
        body_limit: Callable[[str, str], int],
        idle_s: float,
        error_body: ErrorBody = plain_detail,
    ) -> None:
        self._app = app
        self._body_limit = body_limit
        self._idle_s = idle_s
        self._error_body = error_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        limit = self._body_limit(scope["method"], scope["path"])
        announced = [value for name, value in scope["headers"] if name == b"content-length"]
        if wrong := _wrong_length(announced, limit):
            await self._refuse(scope, send, *wrong)
            return
        body = _Body(receive, limit, self._idle_s)
        is_started = False
        held: Message | None = None

        async def watched(message: Message) -> None:
            nonlocal is_started, held
            if body.refusal is not None and not is_started:
                return  # whatever a route made of the exception: the answer is ours
            if message["type"] == "http.response.start":
                held = message  # until it is known whether the body is whole
                return
            if held is not None:
                start, held = held, None
                if not message.get("more_body", False):
                    digest = digest_of(message.get("body", b"")).encode()
                    start = {**start, "headers": [*start["headers"], (_DIGEST, digest)]}
                is_started = True
                await send(start)
            await send(message)

        try:
            await self._app(scope, body.receive, watched)
        except _Refused:
            pass  # it ended the request; its reason is in ``body.refusal``, which is told below
        except Exception:
            # Nothing is lost here: it is raised, logged as a failure of ours, or the consequence of
            # a body that was refused, which the client is told below.
            if is_started:
                raise  # the connection ends in the middle of the answer, which tells the client
            if body.refusal is None:
                logger.exception("%s %s failed", scope["method"], scope.get("path", "")[:200])
                words = "the server failed over this request; its log has the reason"
                await self._refuse(scope, send, 500, words)
                return
        if body.refusal is not None and not is_started:
            await self._refuse(scope, send, body.refusal.status, str(body.refusal))

    async def _refuse(self, scope: Scope, send: Send, status: int, words: str) -> None:
        await send_error(send, status, self._error_body(scope["path"], status, words))


async def send_error(
    send: Send, status: int, body: Any, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    """An answer after which the connection is closed, for the request was not read."""
    text = json.dumps(body).encode()
    start = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(text)).encode()),
        (b"connection", b"close"),
        *(headers or []),
    ]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": text})


def _wrong_length(announced: list[bytes], limit: int) -> tuple[int, str] | None:
    """Status and words for what Content-Length says, when it will not do."""
    if not announced:
        return None
    if len(announced) > 1:
        return 400, "Content-Length stands twice"
    if not announced[0].isdigit():
        return 400, "Content-Length is no number"
    if len(announced[0]) > 18 or int(announced[0]) > limit:
        return 413, f"{announced[0].decode()[:20]} bytes announced, the limit here is {limit}"
    return None


class _Body:
    """One request's body, counted and timed."""

    def __init__(self, receive: Receive, limit: int, idle_s: float) -> None:
        self._receive = receive
        self._limit = limit
        self._idle_s = idle_s
        self._came = 0
        self._waited = 0.0
        self._is_whole = False
        self.refusal: _Refused | None = None

    async def receive(self) -> Message:
        if self.refusal is not None:
            raise self.refusal
        if self._is_whole:
            return await self._receive()  # the disconnect, which may take as long as the answer
        clock = asyncio.get_running_loop().time
        left = self._idle_s + self._came / SLOWEST_BYTES_PER_S - self._waited
        started = clock()
        try:
            async with asyncio.timeout(min(self._idle_s, max(left, 0.0))):
                message = await self._receive()
        except TimeoutError:
            self.refusal = _Refused(
                408,
                f"the body stopped, or came too slowly: {self._came} bytes in "
                f"{self._waited + clock() - started:.1f} s of waiting",
            )
            raise self.refusal from None
        self._waited += clock() - started
        self._came += len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        if self._came > self._limit:  # without a Content-Length only counting tells
            self.refusal = _Refused(413, f"the body is over the limit of {self._limit} bytes here")
            raise self.refusal
        return message


def no_more_than(limit: int = MAX_JSON_BYTES) -> Callable[[str, str], int]:
    """The same limit for every method and path."""
    return lambda _method, _path: limit
