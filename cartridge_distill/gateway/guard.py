"""Before any route: who may come in.

A plain ASGI layer, so that nothing of a refused request's body is read. What one who may come in
may bring is bounded behind it (:class:`cartridge_distill.util.http_front.Front`).
"""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cartridge_distill.gateway.chat import error_body
from cartridge_distill.gateway.metrics import Metrics
from cartridge_distill.util.http_front import send_error

OPEN_PATHS = frozenset({"/ping"})


class Guard:
    """Checks the bearer token; counts what was answered.

    Args:
        app: what is guarded.
        token: None leaves the gateway open (loopback only; the command line sees to that).
        metrics: answers are counted, refusals too.
    """

    def __init__(self, app: ASGIApp, token: str | None, metrics: Metrics) -> None:
        self._app = app
        self._expected = None if token is None else f"Bearer {token}".encode()
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        if self._expected is not None and scope["path"] not in OPEN_PATHS:
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            if wrong := self._wrong(given):
                self._metrics.requests.labels("refused", "401").inc()
                words = f"the bearer token is {wrong}: send 'Authorization: Bearer TOKEN' once"
                header = (b"www-authenticate", b"Bearer")
                await send_error(send, 401, error_body(scope["path"], 401, words), [header])
                return
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            # Starlette leaves the matched route in the scope; unknown paths must not each
            # make a time series.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()

    def _wrong(self, given: list[bytes]) -> str | None:
        """What is wrong with the Authorization headers of a request; None for nothing."""
        if not given:
            return "missing"
        if len(given) > 1:
            return "sent twice"  # a proxy and we might each believe another one
        # Constant time: how much of a guess was right must not be measurable.
        return None if hmac.compare_digest(given[0], self._expected or b"") else "wrong"
