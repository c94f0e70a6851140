"""HTTP with patience: what can pass is tried again, what cannot fails at once.

Tried again, with exponential backoff and jitter, a bounded number of times: connection errors,
timeouts, HTTP 408, 425, 429 and 5xx, and answers that are cut short or are not JSON. A server's
``Retry-After`` is the least wait, the backoff still grows. Other statuses fail with the server's
own words.

Credentials come from the environment and are never logged: ``TOKASAURUS_API_KEY`` (bearer token),
``MODAL_PROXY_KEY`` and ``MODAL_PROXY_SECRET`` (Modal's proxy authentication).
"""

from __future__ import annotations

import email.utils
import functools
import json
import logging
import os
import ssl
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import httpx
import tenacity

from cartridge_distill.util.errors import RolloutError, ServerRefused, ServerUnreachable

logger = logging.getLogger(__name__)

HOW_TO_START = (
    "Start one with `python -m cartridge_distill.server --model MODEL --cartridge-dir DIR`, or "
    "deploy a real one (modal/), and pass its URL (TOKASAURUS_URL)"
)
CREDENTIAL_VARIABLES = ("TOKASAURUS_API_KEY", "MODAL_PROXY_KEY", "MODAL_PROXY_SECRET")
CREDENTIALS = (
    "set TOKASAURUS_API_KEY to the gateway's token, and for Modal's proxy authentication "
    "MODAL_PROXY_KEY and MODAL_PROXY_SECRET"
)
_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
# Of no use to try again, though they are above 500: not implemented; the disk bound is reached.
_FINAL_STATUS = frozenset({501, 505, 507})
# A server that asks for more patience than this is not worth a training step's time.
_LONGEST_RETRY_AFTER = 60.0
_IDLE_SECONDS = 60.0  # for which an unused connection is kept
_MAX_REDIRECTS = 50

BROKEN = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError)
"""No reply, or only a part of one."""


@dataclass(frozen=True)
class ClientSettings:
    """Patience of a client.

    Attributes:
        max_attempts: attempts for one request, the first included.
        backoff_s, max_backoff_s: first and longest wait between attempts; jitter is added.
        connect_timeout_s, read_timeout_s: per attempt; reading covers the whole generation.
        startup_timeout_s: how long ``TokasaurusClient.wait_until_ready`` waits.
        max_connections: requests in flight; more wait for a connection.
    """

    max_attempts: int = 6
    backoff_s: float = 0.5
    max_backoff_s: float = 20.0
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 600.0
    startup_timeout_s: float = 600.0
    max_connections: int = 256


@dataclass(frozen=True)
class Reply:
    """What a server sent back, whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")


class _Anew:
    """A body that begins anew each time it is sent: aiohttp tries once more on a fresh connection
    where the kept one had been closed."""

    def __init__(self, content: Callable[[], AsyncIterator[bytes]]) -> None:
        self._content = content

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._content()


class _Passing(Exception):
    """An attempt failed in a way that may pass. ``wait_s``: what the server asked for."""

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def auth_headers(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Headers from the environment.

    Raises:
        RolloutError: one half of Modal's pair is missing.
    """
    headers = {}
    if key := environment.get("TOKASAURUS_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    modal_key = environment.get("MODAL_PROXY_KEY")
    modal_secret = environment.get("MODAL_PROXY_SECRET")
    if modal_key and modal_secret:
        headers |= {"Modal-Key": modal_key, "Modal-Secret": modal_secret}
    elif modal_key or modal_secret:
        raise RolloutError(
            "only one of MODAL_PROXY_KEY and MODAL_PROXY_SECRET is set; Modal needs both"
        )
    return headers


class RetryingHttp:
    """JSON over HTTP to one server.

    Args:
        url: base URL of the server, without a path.
        settings: timeouts and attempts.

    Raises:
        RolloutError: a URL that is none.
    """

    def __init__(self, url: str, settings: ClientSettings | None = None) -> None:
        self.url = url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise RolloutError(f"server URL {url!r} must begin with http:// or https://")
        self.settings = settings or ClientSettings()
        self._headers = auth_headers()
        self._proxy = proxy_for(self.url)
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        """The connections, made where the event loop runs: at the first request."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=self.settings.max_connections,
                    keepalive_timeout=_IDLE_SECONDS,
                    ssl=_tls() if self.url.startswith("https://") else True,
                ),
                headers=self._headers,
            )
        return self._session

    async def close(self) -> None:
        """Closes all connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        content: Callable[[], AsyncIterator[bytes]] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Reply:
        """One attempt, redirects followed; any status is a reply.

        Args:
            body: sent as JSON.
            content: instead of ``body``.
            headers: further headers.
            timeout_s: for all of it; by default the settings' for connecting and for each read.

        Raises:
            One of :data:`BROKEN`: there was no reply, or only a part of one.
            RolloutError: too many redirects.
        """
        if timeout_s is None:
            # Waiting for a free connection is not the server's fault: that has no limit.
            timeout = aiohttp.ClientTimeout(
                sock_connect=self.settings.connect_timeout_s, sock_read=self.settings.read_timeout_s
            )
        else:
            timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._open().request(
                method,
                self.url + path,
                json=body,
                data=None if content is None else _Anew(content),
                headers=headers,
                timeout=timeout,
                proxy=self._proxy,
                # Modal answers 303 when a request takes long; the result is fetched from there.
                max_redirects=_MAX_REDIRECTS,
            ) as response:
                return Reply(response.status, response.headers, await response.read())
        except aiohttp.TooManyRedirects as error:
            raise RolloutError(
                f"{method} {self.url}{path}: more than {_MAX_REDIRECTS} redirects; "
                "is the URL right?"
            ) from error

    async def json(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        content: Callable[[], AsyncIterator[bytes]] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """The JSON of the answer, after as many attempts as it takes or are allowed.

        Args:
            body: sent as JSON.
            content: instead of ``body``; called anew for each attempt.
            headers: further headers.

        Raises:
            ServerUnreachable: no connection after all attempts.
            ServerRefused: a status that no further attempt would change.
            RolloutError: it kept failing.
        """
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((_Passing, *BROKEN)),
            stop=tenacity.stop_after_attempt(self.settings.max_attempts),
            wait=self._wait,
            before_sleep=self._note,
        )
        try:
            return await retrying(self._attempt, method, path, body, content, headers)
        except tenacity.RetryError as error:
            cause = error.last_attempt.exception()
            made = error.last_attempt.attempt_number
            message = (
                f"{method} {self.url}{path} failed {made} times; the last time: {describe(cause)}"
            )
            if isinstance(cause, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
                raise ServerUnreachable(f"{message}. {HOW_TO_START}") from cause
            raise RolloutError(f"{message}. Look into the server's log") from cause

    async def _attempt(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        content: Callable[[], AsyncIterator[bytes]] | None,
        headers: Mapping[str, str] | None,
    ) -> Any:
        reply = await self.request(method, path, body, content, headers)
        status = reply.status
        if status in _PASSING_STATUS or (status >= 500 and status not in _FINAL_STATUS):
            raise _Passing(f"HTTP {status}: {detail(reply)}", _retry_after(reply.headers))
        if not 200 <= status < 300:
            fix = f"; {CREDENTIALS}" if status in (401, 403) else ""
            raise ServerRefused(
                f"{method} {self.url}{path} was refused with HTTP {status}: {detail(reply)}{fix}",
                status,
            )
        try:
            return json.loads(reply.body)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            text = reply.text
            raise _Passing(
                f"the answer is not JSON ({error}): {len(text)} characters, ending {text[-40:]!r}"
            ) from error

    def _wait(self, state: tenacity.RetryCallState) -> float:
        settings = self.settings
        backoff = tenacity.wait_exponential(settings.backoff_s, settings.max_backoff_s)(state)
        backoff += tenacity.wait_random(0.0, settings.backoff_s)(state)
        error = state.outcome.exception() if state.outcome else None
        asked = error.wait_s if isinstance(error, _Passing) else None
        return backoff if asked is None else max(asked, backoff)

    def _note(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        logger.warning(
            "attempt %d of %d at %s failed (%s); the next in %.1f s",
            state.attempt_number,
            self.settings.max_attempts,
            self.url,
            describe(error),
            state.upcoming_sleep,
        )


@functools.cache
def _tls() -> ssl.SSLContext:
    """One for all connections: reading the list of authorities takes some 20 ms.

    httpx's, which brings the list along: not every container has one of its own.
    """
    return httpx.create_ssl_context()


def proxy_for(url: str) -> str | None:
    """The proxy that the environment (``HTTPS_PROXY``, ``NO_PROXY``, ...) names for a URL.

    aiohttp would look itself, and take credentials from ``~/.netrc`` as well.
    """
    parts = urllib.parse.urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")


def describe(error: BaseException | None) -> str:
    """An error in words; some have no message."""
    if isinstance(error, _Passing):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def detail(reply: Reply) -> str:
    """The server's own words: FastAPI's ``detail``, or the beginning of the body."""
    try:
        body = json.loads(reply.body)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return reply.text[:300] or "no text"
    words = body.get("detail", body) if isinstance(body, dict) else body
    return str(words)[:600]


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds the server asks for, in either form of the header, bounded; None without one."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    if seconds != seconds:
        return None
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER)
