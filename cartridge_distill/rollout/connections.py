"""One connection for each request in flight.

httpx's own pool gives an idle connection to every request that waits; one gets it, the others go
back to the end of the line, and each change walks over all connections (a system call each). With
64 requests in flight that costs more than the requests, and some wait for seconds. Here a request
takes the connection that was used last, or makes one.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable

import httpx


class ConnectionPerRequest(httpx.AsyncBaseTransport):
    """A pool for requests to one server.

    Args:
        limit: requests in flight; more wait, first come first served.
        idle_s: how long an unused connection is kept.
        proxy: URL of an HTTP proxy on the way, or None.
    """

    def __init__(self, limit: int, idle_s: float, proxy: str | None = None) -> None:
        self._free = asyncio.Semaphore(limit)
        self._limits = httpx.Limits(
            max_connections=1, max_keepalive_connections=1, keepalive_expiry=idle_s
        )
        self._proxy = proxy
        self._idle: list[httpx.AsyncHTTPTransport] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await self._free.acquire()
        transport = (
            self._idle.pop()
            if self._idle
            else httpx.AsyncHTTPTransport(limits=self._limits, verify=_tls(), proxy=self._proxy)
        )

        def give_back() -> None:
            self._idle.append(transport)
            self._free.release()

        try:
            response = await transport.handle_async_request(request)
        except BaseException:
            give_back()
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Returning(response.stream, give_back)
        return response

    async def aclose(self) -> None:
        for transport in self._idle:
            await transport.aclose()


@functools.cache
def _tls() -> ssl.SSLContext:
    """One for all connections: reading the list of authorities takes some 20 ms."""
    return httpx.create_ssl_context()


def proxy_for(url: str) -> str | None:
    """The proxy that the environment (``HTTPS_PROXY``, ``NO_PROXY``, ...) names for a URL.

    httpx would look itself, and send such requests past a transport that it was given.
    """
    parts = urllib.parse.urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")


class _Returning(httpx.AsyncByteStream):
    """A body that gives its connection back when it is closed."""

    def __init__(self, inner: httpx.AsyncByteStream, give_back: Callable[[], None]) -> None:
        self._inner = inner
        self._give_back: Callable[[], None] | None = give_back

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._inner:
            yield chunk

    async def aclose(self) -> None:
        try:
            await self._inner.aclose()
        finally:
            give_back, self._give_back = self._give_back, None
            if give_back is not None:
                give_back()
