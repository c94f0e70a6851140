"""HTTP with patience: what can pass is tried again, what cannot fails at once.

Tried again, with exponential backoff and jitter, a bounded number of times: connection errors,
timeouts, HTTP 408, 425, 429 and 5xx, and answers that are cut short, are not JSON, or have another
SHA-256 than their ``Content-Digest`` says. A server's
``Retry-After`` is the least wait, the backoff still grows. Other statuses fail with the server's
own words.

Credentials come from the environment and are never logged: ``TOKASAURUS_API_KEY`` (bearer token),
``MODAL_PROXY_KEY`` and ``MODAL_PROXY_SECRET`` (Modal's proxy authentication). A URL that holds a
user or a password is refused. A redirect is followed only where it cannot carry them elsewhere, see
:mod:`cartridge_distill.rollout.redirects`.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import tenacity
from yarl import URL

from cartridge_distill.rollout.connections import proxy_for, tls
from cartridge_distill.rollout.redirects import MAX_REDIRECTS, Target, next_target
from cartridge_distill.util.content_digest import HEADER, is_of
from cartridge_distill.util.errors import (
    RolloutError,
    ServerRefused,
    ServerUnreachable,
)
from cartridge_distill.util.secrecy import clean_text
from cartridge_distill.util.server_url import checked_url

logger = logging.getLogger(__name__)

HOW_TO_START = (
    "fix: start one with `cartridge-distill serve --model MODEL`, or a real one (docs/serving.md), "
    "and name its URL (--server; TOKASAURUS_URL for the run script)"
)
CREDENTIAL_VARIABLES = ("TOKASAURUS_API_KEY", "MODAL_PROXY_KEY", "MODAL_PROXY_SECRET")
CREDENTIALS = (
    "fix: set TOKASAURUS_API_KEY to the gateway's token, and for Modal's proxy authentication "
    "MODAL_PROXY_KEY and MODAL_PROXY_SECRET"
)
_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
# Of no use to try again, though they are above 500: not implemented; the disk bound is reached.
_FINAL_STATUS = frozenset({501, 505, 507})
# A server that asks for more patience than this is not worth a training step's time.
_LONGEST_RETRY_AFTER = 60.0
_IDLE_SECONDS = 60.0  # for which an unused connection is kept
# Far more than any answer here: 64 choices of 16,384 tokens are 15 MB.
_LARGEST_ANSWER = 2**28
# Cut off, no text, a number of more digits than Python reads, or nested without end.
_NO_JSON = (ValueError, RecursionError)

BROKEN = (
    aiohttp.ClientConnectionError,
    aiohttp.ClientPayloadError,
    aiohttp.ClientResponseError,
    TimeoutError,
)
"""No reply, only a part of one, or one that is not HTTP."""


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
        """The body as text; what is no UTF-8 is replaced."""
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
        RolloutError: one half of Modal's pair is missing, or a value cannot be sent.
    """
    for name in CREDENTIAL_VARIABLES:
        value = environment.get(name, "")
        if not (value.isascii() and value.isprintable()) or " " in value:
            raise RolloutError(
                f"{name} holds a blank, a line end or a character that no HTTP header may have; "
                "fix: set it anew, without what stands around it"
            )
    headers = {}
    if key := environment.get("TOKASAURUS_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    modal_key = environment.get("MODAL_PROXY_KEY")
    modal_secret = environment.get("MODAL_PROXY_SECRET")
    if modal_key and modal_secret:
        headers |= {"Modal-Key": modal_key, "Modal-Secret": modal_secret}
    elif modal_key or modal_secret:
        raise RolloutError(
            "only one of MODAL_PROXY_KEY and MODAL_PROXY_SECRET is set, and Modal needs both; fix: "
            "set both"
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
        try:
            self.url = checked_url(url)
            URL(self.url)  # which aiohttp reads it with
        except ValueError as error:  # a ConfigError is one
            raise RolloutError(str(error)) from None
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
                    ssl=tls() if self.url.startswith("https://") else True,
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
        """One attempt; any status is a reply, also a redirect that leads nowhere.

        Args:
            body: sent as JSON.
            content: instead of ``body``.
            headers: further headers.
            timeout_s: for all of it; by default the settings' for connecting and for each read.

        Raises:
            One of :data:`BROKEN`: there was no reply, or only a part of one.
            RolloutError: a redirect that is not followed, too many of them, or a reply without end.
        """
        if timeout_s is None:
            # Waiting for a free connection is not the server's fault: that has no limit.
            timeout = aiohttp.ClientTimeout(
                sock_connect=self.settings.connect_timeout_s, sock_read=self.settings.read_timeout_s
            )
        else:
            timeout = aiohttp.ClientTimeout(total=timeout_s)
        target = Target(method, self.url + path, with_body=body is not None or content is not None)
        for _ in range(MAX_REDIRECTS + 1):
            sent = {"json": body, "data": None if content is None else _Anew(content)}
            async with self._open().request(
                target.method,
                URL(target.url, encoded=target.is_encoded),
                **(sent if target.with_body else {}),  # type: ignore[arg-type]
                headers=headers if target.with_body or target.method == method else None,
                timeout=timeout,
                proxy=self._proxy,
                allow_redirects=False,  # aiohttp would take the credentials along
            ) as response:
                onward = next_target(target, response.status, response.headers.get("Location"))
                if onward is None:
                    answer = await self._whole(response, f"{method} {self.url}{path}")
                    return Reply(response.status, response.headers, answer)
            target = onward
        raise RolloutError(
            f"{method} {self.url}{path}: more than {MAX_REDIRECTS} redirects; fix: give the "
            "server's own URL"
        )

    async def _whole(self, response: aiohttp.ClientResponse, asked: str) -> bytes:
        """The body, which must have an end."""
        came = bytearray()
        async for chunk in response.content.iter_any():
            came += chunk
            if len(came) > _LARGEST_ANSWER:
                raise RolloutError(
                    f"{asked}: the answer is over {_LARGEST_ANSWER} bytes, more than any answer of "
                    "this protocol; fix: look whether the URL is the server's"
                )
        return bytes(came)

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
                raise ServerUnreachable(f"{message}; {HOW_TO_START}") from cause
            raise RolloutError(f"{message}; fix: look into the server's log") from cause

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
        if not is_of(reply.headers.get(HEADER), reply.body):
            raise _Passing(
                f"the answer's {len(reply.body)} bytes are not those that the server sent: their "
                f"SHA-256 is not that of {HEADER}"
            )
        try:
            return json.loads(reply.body)
        except _NO_JSON as error:
            text = reply.text
            raise _Passing(
                f"the answer is not JSON ({error}): {len(text)} characters, ending {text[-40:]!r}"
            ) from error

    async def pause(self, attempt: int, error: Exception) -> None:
        """Between two attempts of a caller who cannot use an answer: a word, and the usual wait.

        Args:
            attempt: the number of the one that failed.
        """
        state = tenacity.RetryCallState(tenacity.AsyncRetrying(), None, (), {})
        state.attempt_number = attempt
        state.set_exception((type(error), error, error.__traceback__))
        state.upcoming_sleep = self._wait(state)
        self._note(state)
        await asyncio.sleep(state.upcoming_sleep)

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


def describe(error: BaseException | None) -> str:
    """An error in words, without credentials; some have no message."""
    if isinstance(error, _Passing):
        return clean_text(str(error))
    name = type(error).__name__
    return clean_text(f"{name}: {error}") if str(error) else name


def detail(reply: Reply) -> str:
    """The server's own words: FastAPI's ``detail``, OpenAI's ``error``, or the body's beginning."""
    try:
        body = json.loads(reply.body)
    except _NO_JSON:
        return reply.text[:300] or "no text"
    words = body.get("detail", body) if isinstance(body, dict) else body
    error = words.get("error") if isinstance(words, dict) else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        words = error["message"]
    # A lone surrogate of the server's could not be printed.
    return str(words)[:600].encode(errors="replace").decode()


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
        except (ValueError, TypeError, ArithmeticError, OSError):  # dates beyond any calendar
            return None
    if seconds != seconds:
        return None
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER)
