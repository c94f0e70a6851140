"""Client of a Tokasaurus server: many requests in flight, bounded retries, checked answers.

What can pass is tried again, with exponential backoff and jitter, a bounded number of times:
connection errors, timeouts, HTTP 408 and 429 (``Retry-After`` is honoured), 5xx, and bodies that
are cut short or are not JSON. What cannot pass fails at once with the server's own words: other 4xx
(a prompt over the limit, a missing cartridge), and answers whose tokens or log-probs are malformed
or not finite. Nothing is replaced by a default: a caller gets tokens with log-probs, or an error.

A server that starts cold (minutes, on a rented GPU) is waited for with :meth:`wait_until_ready`.

Credentials come from the environment and are never logged: ``TOKASAURUS_API_KEY`` (bearer token),
``MODAL_PROXY_KEY`` and ``MODAL_PROXY_SECRET`` (Modal's proxy authentication).

Not done here: batching (the server batches what is in flight), streaming, files and batches.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx
import tenacity
from pydantic import ValidationError

from cartridge_distill.errors import RolloutError, ServerUnreachable
from cartridge_distill.wire import (
    CartridgeCompletionRequest,
    CartridgeRef,
    CompletionResponse,
    ModelList,
    decode_fingerprint,
)

logger = logging.getLogger(__name__)

HOW_TO_START = (
    "Start one with `python -m cartridge_distill.server --model MODEL --cartridge-dir DIR`, or "
    "deploy a real one (modal/), and pass its URL (TOKASAURUS_URL)"
)
_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
# A server that asks for more patience than this is not worth a training step's time.
_LONGEST_RETRY_AFTER = 60.0


@dataclass(frozen=True)
class Completion:
    """One sampled continuation.

    Attributes:
        token_ids: n ids, the end token included when one was sampled.
        logprobs: n log-probs of the *tempered* distribution the tokens were sampled from.
        finish_reason: "stop" or "length".
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


@dataclass(frozen=True)
class ClientSettings:
    """Patience of a client.

    Attributes:
        max_attempts: attempts for one request, the first included.
        backoff_s, max_backoff_s: first and longest wait between attempts; jitter is added.
        connect_timeout_s, read_timeout_s: per attempt; reading covers the whole generation.
        startup_timeout_s: how long :meth:`TokasaurusClient.wait_until_ready` waits.
        max_connections: requests in flight; more wait for a connection.
    """

    max_attempts: int = 6
    backoff_s: float = 0.5
    max_backoff_s: float = 20.0
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 600.0
    startup_timeout_s: float = 600.0
    max_connections: int = 256


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


class TokasaurusClient:
    """Async client of one server; an async context manager.

    >>> async with TokasaurusClient("http://127.0.0.1:10210") as client:
    ...     await client.wait_until_ready()
    ...     v1 = CartridgeRef(id="v1", source="local")
    ...     [completion] = await client.complete(ids, 16, 0.7, [v1])

    Args:
        url: base URL of the server, without a path.
        settings: timeouts and attempts.
        vocab_size: when given, sampled ids must be below it.

    Raises:
        RolloutError: a URL that is none.
    """

    def __init__(
        self,
        url: str,
        settings: ClientSettings | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise RolloutError(f"server URL {url!r} must begin with http:// or https://")
        self.settings = settings or ClientSettings()
        self._vocab_size = vocab_size
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=auth_headers(),
            timeout=httpx.Timeout(
                self.settings.read_timeout_s,
                connect=self.settings.connect_timeout_s,
                pool=None,  # waiting for a free connection is not the server's fault
            ),
            limits=httpx.Limits(
                max_connections=self.settings.max_connections,
                max_keepalive_connections=self.settings.max_connections,
                keepalive_expiry=60.0,
            ),
            # Modal answers 303 when a request takes long; the result is fetched from there.
            follow_redirects=True,
            max_redirects=50,
        )

    async def __aenter__(self) -> TokasaurusClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes all connections."""
        await self._http.aclose()

    # --- requests ---------------------------------------------------------------------------

    async def ping(self) -> bool:
        """One attempt: does the server answer?"""
        try:
            response = await self._http.get("/ping", timeout=self.settings.connect_timeout_s)
        except httpx.HTTPError:
            return False
        return response.status_code == 200

    async def wait_until_ready(self) -> None:
        """Polls ``/ping`` until the server answers, saying so every few seconds.

        Raises:
            ServerUnreachable: it did not within ``startup_timeout_s``, or refuses the credentials.
        """
        start = time.monotonic()
        deadline = start + self.settings.startup_timeout_s
        next_word, pause, cause = start, 0.2, "no attempt was made"
        while True:
            try:
                left = max(0.1, deadline - time.monotonic())
                # A cold start on a rented GPU holds the request open: give it what time there is.
                response = await self._http.get("/ping", timeout=left)
                if response.status_code == 200:
                    return
                cause = f"HTTP {response.status_code}: {_detail(response)}"
                if response.status_code in (401, 403):
                    raise ServerUnreachable(
                        f"{self.url} refuses the credentials ({cause}); set TOKASAURUS_API_KEY, or "
                        "MODAL_PROXY_KEY and MODAL_PROXY_SECRET"
                    )
            except httpx.HTTPError as error:
                cause = _describe(error)
            now = time.monotonic()
            if now >= deadline:
                raise ServerUnreachable(
                    f"no inference server at {self.url} after {now - start:.0f} s (last: {cause}). "
                    + HOW_TO_START
                )
            if now >= next_word:
                logger.info(
                    "waiting for the inference server at %s: %.0f of %.0f s (%s)",
                    self.url,
                    now - start,
                    self.settings.startup_timeout_s,
                    cause,
                )
                next_word = now + 5.0
            await asyncio.sleep(min(pause, max(0.0, deadline - now)))
            pause = min(pause * 1.5, 3.0)

    async def models(self) -> list[str]:
        """Names of the models the server has loaded."""
        body = await self._request("GET", "/v1/models", None)
        try:
            return [card.id for card in ModelList.model_validate(body).data]
        except ValidationError as error:
            raise RolloutError(f"{self.url}/v1/models: {_first_problem(error)}") from error

    async def complete(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        temperature: float,
        cartridges: Sequence[CartridgeRef] = (),
        n: int = 1,
    ) -> list[Completion]:
        """Samples n continuations of a prompt behind some cartridges.

        Args:
            prompt_ids: the prompt, used as given.
            max_tokens: new tokens at most.
            temperature: 0 is greedy.
            cartridges: joined by the server in alphabetical order of id.
            n: continuations.

        Returns:
            n completions, checked: as many log-probs as tokens, all finite, ids in the vocabulary.

        Raises:
            ServerUnreachable: no connection after all attempts.
            RolloutError: the server refused, kept failing, or answered nonsense.
        """
        request = CartridgeCompletionRequest(
            model="default",
            prompt=list(prompt_ids),
            max_tokens=max_tokens,
            temperature=temperature,
            n=n,
            cartridges=list(cartridges),
            logprobs_in_fingerprint=True,
        )
        path = "/custom/cartridge/completions"
        body = await self._request("POST", path, request.model_dump(exclude_unset=True))
        try:
            answer = CompletionResponse.model_validate(body)
        except ValidationError as error:
            raise RolloutError(f"{self.url}{path}: {_first_problem(error)}") from error
        tokens = decode_fingerprint(answer.system_fingerprint, n, self._vocab_size)
        if len(answer.choices) != n:
            raise RolloutError(f"{self.url}{path}: {len(answer.choices)} choices, asked for {n}")
        completions = []
        for number, (choice, sampled) in enumerate(zip(answer.choices, tokens, strict=True)):
            if len(sampled.token_ids) > max_tokens:
                raise RolloutError(
                    f"choice {number} has {len(sampled.token_ids)} tokens, asked for at most "
                    f"{max_tokens}"
                )
            if choice.finish_reason not in ("stop", "length"):
                raise RolloutError(
                    f"choice {number} ended with finish_reason {choice.finish_reason!r}, "
                    "not 'stop' or 'length'"
                )
            assert sampled.logprobs is not None  # decode_fingerprint requires them
            completions.append(
                Completion(sampled.token_ids, sampled.logprobs, choice.finish_reason)
            )
        return completions

    # --- attempts ---------------------------------------------------------------------------

    async def _request(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON of the answer, after as many attempts as it takes or are allowed."""
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((_Passing, httpx.TransportError)),
            stop=tenacity.stop_after_attempt(self.settings.max_attempts),
            wait=self._wait,
            before_sleep=self._note,
        )
        try:
            return await retrying(self._attempt, method, path, body)
        except tenacity.RetryError as error:
            cause = error.last_attempt.exception()
            made = error.last_attempt.attempt_number
            message = (
                f"{method} {self.url}{path} failed {made} times; the last time: {_describe(cause)}"
            )
            if isinstance(cause, httpx.ConnectError | httpx.ConnectTimeout):
                raise ServerUnreachable(f"{message}. {HOW_TO_START}") from cause
            raise RolloutError(f"{message}. Look into the server's log") from cause

    async def _attempt(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        try:
            response = await self._http.request(method, path, json=body)
        except httpx.TooManyRedirects as error:
            raise RolloutError(f"{method} {self.url}{path}: {error}; is the URL right?") from error
        except httpx.DecodingError as error:
            raise _Passing(f"the answer could not be decompressed: {error}") from error
        status = response.status_code
        if status in _PASSING_STATUS or status >= 500:
            raise _Passing(f"HTTP {status}: {_detail(response)}", _retry_after(response))
        if status != 200:
            raise RolloutError(
                f"{method} {self.url}{path} was refused with HTTP {status}: {_detail(response)}"
            )
        try:
            return response.json()
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            text = response.text
            raise _Passing(
                f"the answer is not JSON ({error}): {len(text)} characters, ending {text[-40:]!r}"
            ) from error

    def _wait(self, state: tenacity.RetryCallState) -> float:
        settings = self.settings
        backoff = tenacity.wait_exponential(settings.backoff_s, settings.max_backoff_s)(state)
        backoff += tenacity.wait_random(0.0, settings.backoff_s)(state)
        error = state.outcome.exception() if state.outcome else None
        asked = error.wait_s if isinstance(error, _Passing) else None
        return backoff if asked is None else max(asked, 0.0)

    def _note(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        logger.warning(
            "attempt %d of %d at %s failed (%s); the next in %.1f s",
            state.attempt_number,
            self.settings.max_attempts,
            self.url,
            _describe(error),
            state.upcoming_sleep,
        )


def _describe(error: BaseException | None) -> str:
    """httpx leaves the message of some errors empty."""
    if isinstance(error, _Passing):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _detail(response: httpx.Response) -> str:
    """The server's own words: FastAPI's ``detail``, or the beginning of the body."""
    try:
        body = response.json()
    except (json.JSONDecodeError, UnicodeDecodeError):
        return response.text[:300] or "no text"
    detail = body.get("detail", body) if isinstance(body, dict) else body
    return str(detail)[:600]


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds the server asks for, in either form of the header, bounded; None without one."""
    value = response.headers.get("Retry-After")
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


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"the answer does not follow the protocol: {where}: {problem['msg']}"
