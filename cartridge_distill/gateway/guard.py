"""Before any route: who may come in, and how much they may bring.

A plain ASGI layer, so that nothing of a refused request's body is read.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cartridge_distill.gateway.chat import is_openai
from cartridge_distill.gateway.metrics import Metrics
from cartridge_distill.server.openai.errors import ApiError

OPEN_PATHS = frozenset({"/ping"})


class BodyTooLarge(Exception):
    """More bytes came than the route takes."""


class Guard:
    """Checks the bearer token and the announced and the real size of bodies.

    Args:
        app: what is guarded.
        token: None leaves the gateway open (loopback only; the command line sees to that).
        body_limit: bytes a request may bring, by method and path.
        metrics: refusals are counted.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str | None,
        body_limit: Callable[[str, str], int],
        metrics: Metrics,
    ) -> None:
        self._app = app
        self._expected = None if token is None else f"Bearer {token}".encode()
        self._body_limit = body_limit
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._expected is not None and scope["path"] not in OPEN_PATHS:
            given = headers.get(b"authorization", b"")
            # Constant time: how much of a guess was right must not be measurable.
            if not hmac.compare_digest(given, self._expected):
                words = "missing" if not given else "wrong"
                await self._refuse(
                    scope,
                    send,
                    401,
                    f"the bearer token is {words}: send the header 'Authorization: Bearer TOKEN'",
                    [(b"www-authenticate", b"Bearer")],
                )
                return
        limit = self._body_limit(scope["method"], scope["path"])
        announced = headers.get(b"content-length", b"0")
        if not announced.isdigit():
            await self._refuse(scope, send, 400, "Content-Length is no number")
            return
        if int(announced) > limit:
            await self._refuse(
                scope, send, 413, f"{int(announced)} bytes announced, the limit here is {limit}"
            )
            return
        came, status, too_large = 0, 500, False

        async def bounded() -> Message:
            nonlocal came, too_large
            message = await receive()
            came += len(message.get("body", b""))
            if came > limit:  # without a Content-Length only counting tells
                too_large = True
                raise BodyTooLarge
            return message

        async def watched(message: Message) -> None:
            nonlocal status
            if too_large and status == 500:
                return  # whatever a route made of the exception: the answer is ours
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, bounded, watched)
        except BodyTooLarge:
            pass
        finally:
            if too_large and status == 500:
                await self._refuse(
                    scope, send, 413, f"the body is over the limit of {limit} bytes here"
                )
            else:
                # Starlette leaves the matched route in the scope; unknown paths must not each
                # make a time series.
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(route, str(status)).inc()

    async def _refuse(
        self,
        scope: Scope,
        send: Send,
        status: int,
        detail: str,
        headers: list[tuple[bytes, bytes]] | None = None,
    ) -> None:
        self._metrics.requests.labels("refused", str(status)).inc()
        error = ApiError(status, detail).body if is_openai(scope["path"]) else {"detail": detail}
        body = json.dumps(error).encode()
        start = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            # The body was not read: the connection cannot be used again.
            (b"connection", b"close"),
            *(headers or []),
        ]
        await send({"type": "http.response.start", "status": status, "headers": start})
        await send({"type": "http.response.body", "body": body})
