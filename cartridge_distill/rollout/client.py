"""Client of a Tokasaurus server: many requests in flight, checked answers.

``http`` has the patience. An answer of which tokens or log-probs are missing is asked for again.
What is not retried fails at once with the server's own words: a prompt over the limit, a missing
cartridge, and answers whose tokens or log-probs are malformed or not finite. Nothing is replaced by
a default: a caller gets tokens with log-probs, or an error.

A server that starts cold (minutes, on a rented GPU) is waited for with
:meth:`TokasaurusClient.wait_until_ready`.

Not done here: batching (the server batches what is in flight), streaming, files and batches.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence, Set
from types import TracebackType

from pydantic import ValidationError

from cartridge_distill.rollout.answers import first_problem, read_answer
from cartridge_distill.rollout.fingerprint import AnswerCutShort, Completion
from cartridge_distill.rollout.http import (
    BROKEN,
    CREDENTIALS,
    HOW_TO_START,
    ClientSettings,
    RetryingHttp,
    describe,
    detail,
)
from cartridge_distill.rollout.protocol import (
    CartridgeCompletionRequest,
    CartridgeRef,
    ModelList,
)
from cartridge_distill.util.errors import RolloutError, ServerRefused, ServerUnreachable

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 5.0


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
        end_ids: when given, an answer that ended with "stop" must end with one of them. All ids
            belong here with which the server may end an answer.

    Raises:
        RolloutError: a URL that is none.
    """

    def __init__(
        self,
        url: str,
        settings: ClientSettings | None = None,
        vocab_size: int | None = None,
        end_ids: Set[int] | None = None,
    ) -> None:
        self._http = RetryingHttp(url, settings)
        self.url, self.settings = self._http.url, self._http.settings
        self._vocab_size, self._end_ids = vocab_size, end_ids

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
        await self._http.close()

    # --- requests ---------------------------------------------------------------------------

    async def ping(self) -> bool:
        """One attempt: does the server answer?"""
        try:
            reply = await self._http.request(
                "GET", "/ping", timeout_s=self.settings.connect_timeout_s
            )
        except BROKEN:
            return False
        return reply.status == 200

    async def wait_until_ready(self) -> None:
        """Polls ``/ping`` until the server answers, saying so every few seconds.

        Raises:
            ServerUnreachable: it did not within ``startup_timeout_s``, or refuses the credentials.
        """
        start = time.monotonic()
        deadline = start + self.settings.startup_timeout_s
        pause, cause = 0.2, ""
        reporter = asyncio.create_task(
            self._report_waiting(start, lambda: cause or "no answer yet")
        )
        try:
            while True:
                try:
                    # A cold start on a rented GPU holds the request open: give it the time left.
                    left = max(0.1, deadline - time.monotonic())
                    reply = await self._http.request("GET", "/ping", timeout_s=left)
                    if reply.status == 200:
                        return
                    said, cause = cause, f"HTTP {reply.status}: {detail(reply)}"
                    if reply.status in (401, 403):
                        raise ServerUnreachable(
                            f"{self.url} refuses the credentials ({cause}); {CREDENTIALS}"
                        )
                except BROKEN as error:
                    said, cause = cause, describe(error)
                if not said:  # the first; then every few seconds
                    self._say_waiting(start, cause)
                now = time.monotonic()
                if now >= deadline:
                    raise ServerUnreachable(
                        f"no inference server at {self.url} after {now - start:.0f} s "
                        f"(last: {cause}); {HOW_TO_START}"
                    )
                await asyncio.sleep(min(pause, max(0.0, deadline - now)))
                pause = min(pause * 1.5, 3.0)
        finally:
            reporter.cancel()

    async def _report_waiting(self, start: float, cause: Callable[[], str]) -> None:
        """A line every few seconds, also while one request is held open for minutes."""
        while True:
            await asyncio.sleep(_REPORT_SECONDS)
            self._say_waiting(start, cause())

    def _say_waiting(self, start: float, cause: str) -> None:
        logger.warning(
            "waiting for the inference server at %s: %.0f of %.0f s (%s)",
            self.url,
            time.monotonic() - start,
            self.settings.startup_timeout_s,
            cause,
        )

    async def models(self) -> list[str]:
        """Names of the models the server has loaded.

        Raises:
            RolloutError: as :meth:`complete`; or the answer does not follow the protocol.
        """
        body = await self._http.json("GET", "/v1/models")
        try:
            return [card.id for card in ModelList.model_validate(body).data]
        except ValidationError as error:
            raise RolloutError(f"{self.url}/v1/models: {first_problem(error)}") from error

    async def check_takes_uploads(self) -> None:
        """Is there a gateway, which takes new cartridge versions over HTTP?

        Raises:
            RolloutError: there is not.
        """
        try:
            await self._http.json("GET", "/cartridges")
        except ServerRefused as error:
            if error.status not in (404, 405):
                raise
            raise RolloutError(
                f"{self.url} takes no uploads: it is a bare server; fix: put the gateway in front "
                "of it (python -m cartridge_distill.gateway --help), or give the server's "
                "cartridge directory as this machine sees it (--sync-dir; SYNC_DIR for the run "
                "script)"
            ) from error

    async def complete(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        temperature: float,
        cartridges: Sequence[CartridgeRef] = (),
        n: int = 1,
        seed: int | None = None,
    ) -> list[Completion]:
        """Samples n continuations of a prompt behind some cartridges.

        Args:
            prompt_ids: the prompt, used as given.
            max_tokens: new tokens at most.
            temperature: 0 is greedy.
            cartridges: joined by the server in alphabetical order of id.
            n: continuations.
            seed: makes the embedded server repeat itself, also when the request comes again after
                an answer that was lost; the real one ignores it.

        Returns:
            n completions, checked: as many log-probs as tokens, all finite, ids in the vocabulary,
            and as many tokens as the finish reason says.

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
        if seed is not None:
            request.seed = seed  # set only when given: unset fields are not sent
        path = "/custom/cartridge/completions"
        body = request.model_dump(exclude_unset=True)
        attempt = 0
        while True:
            attempt += 1
            answer = await self._http.json("POST", path, body)
            try:
                return read_answer(answer, n, max_tokens, self._vocab_size, self._end_ids)
            except AnswerCutShort as error:
                if attempt == self.settings.max_attempts:
                    raise RolloutError(
                        f"POST {self.url}{path} failed {attempt} times; the last time: {error}; "
                        "fix: look into the server's log"
                    ) from error
                await self._http.pause(attempt, error)
            except RolloutError as error:
                raise RolloutError(f"POST {self.url}{path}: {error}") from error
