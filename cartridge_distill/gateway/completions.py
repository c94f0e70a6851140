"""Completion requests: bounded, asked of cartridges that are there, and passed through.

What comes back is passed on as it comes, at the pace at which the client reads. A server process
that dies over a request is a 503 for it, so that the client asks again; while it is being started,
requests wait.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack

import aiohttp
from fastapi import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from cartridge_distill.gateway.metrics import Metrics
from cartridge_distill.gateway.pages import PageBudget
from cartridge_distill.gateway.process import ServerDown, ServerProcess, refuse_redirect
from cartridge_distill.gateway.settings import GatewaySettings
from cartridge_distill.gateway.store import VersionStore
from cartridge_distill.gateway.uploads import Busy
from cartridge_distill.rollout.protocol import (
    CartridgeRef,
    ChatCompletionRequest,
    CompletionRequest,
)
from cartridge_distill.util.content_digest import HEADER, is_of
from cartridge_distill.util.disconnect import CLIENT_WENT_AWAY, unless_disconnected

_STREAM_BYTES = 2**16


class Completions:
    """The way of a completion through the gateway."""

    def __init__(
        self,
        settings: GatewaySettings,
        store: VersionStore,
        process: ServerProcess,
        pages: PageBudget,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._store = store
        self._process = process
        self._pages = pages
        self._metrics = metrics
        self._admitted = 0

    async def answer(
        self, request: CompletionRequest | ChatCompletionRequest, http: Request
    ) -> Response:
        """Checks a request and passes it through as it came.

        Raises: as :meth:`ask`.
        """
        return await self.ask(request, http, http.scope["path"], await http.body())

    async def ask(
        self,
        request: CompletionRequest | ChatCompletionRequest,
        http: Request,
        path: str,
        body: bytes,
        whole: bool = False,
    ) -> Response:
        """Checks a request and asks the server.

        Args:
            request: what ``body`` says.
            http: the client's request; when the client goes away, the server's ends.
            path: where the server is asked.
            body: what it is sent.
            whole: read the answer to its end, whatever its size. Else one without an announced
                size is passed on as it comes.

        Raises:
            Busy: more requests at once than allowed.
            HTTPException: 400 for what this server does not serve.
            Unknown: a cartridge that is not there.
            ServerDown: the server process did not come up in time, or died.
        """
        if self._admitted >= self._settings.max_inflight:
            raise Busy(f"{self._admitted} completions are in flight, which is the limit")
        self._check_size(request)
        ids = self._local_ids(getattr(request, "cartridges", None) or [])
        async with AsyncExitStack() as stack:
            # From here on the request counts, and its versions stay, until the last byte is sent.
            self._admit(stack)
            stack.enter_context(self._store.using(ids))
            done = await unless_disconnected(http, self._pass(ids, path, body, whole, stack))
            if done is None:
                return Response(status_code=CLIENT_WENT_AWAY)
            if isinstance(done, StreamingResponse):
                stack.pop_all()  # the response closes it
            return done

    def _admit(self, stack: AsyncExitStack) -> None:
        started = time.monotonic()
        self._admitted += 1
        self._metrics.inflight.set(self._admitted)

        def leave() -> None:
            self._admitted -= 1
            self._metrics.inflight.set(self._admitted)
            self._metrics.latency.observe(time.monotonic() - started)

        stack.callback(leave)

    def _check_size(self, request: CompletionRequest | ChatCompletionRequest) -> None:
        limit = self._settings.max_request_tokens
        new = request.max_tokens or getattr(request, "max_completion_tokens", None) or 0
        prompt = getattr(request, "prompt", None)
        given = len(prompt) if isinstance(prompt, list) else 0
        if given + new > limit:
            raise HTTPException(
                400,
                f"{given} prompt tokens + max_tokens={new} are over this server's limit of "
                f"{limit} tokens for a request",
            )
        if request.n is not None and request.n > self._settings.max_choices:
            raise HTTPException(
                400, f"n={request.n} is over this server's limit of {self._settings.max_choices}"
            )

    def _local_ids(self, refs: Sequence[CartridgeRef]) -> list[str]:
        """The ids that must be here."""
        remote = [ref for ref in refs if ref.source != "local"]
        if remote and not self._settings.allow_remote_cartridges:
            raise HTTPException(
                400,
                f"cartridge {remote[0].id!r} has source {remote[0].source!r}; this server serves "
                "what was uploaded to it: upload it and say source 'local' (or start the gateway "
                "with --allow-remote-cartridges, which lets the server unpickle downloads)",
            )
        for ref in remote:  # what lies here under such an id is served as it is
            self._store.check_served(ref.id)
        return [ref.id for ref in refs if ref.source == "local"]

    async def _pass(
        self, ids: Sequence[str], path: str, body: bytes, whole: bool, stack: AsyncExitStack
    ) -> Response:
        tokens = {name: self._store.info(name).header.num_tokens for name in ids}
        await self._pages.admit(tokens)
        await self._process.wait_up(self._settings.hold_s)
        stack.enter_context(self._process.serving())
        try:
            upstream = await stack.enter_async_context(self._process.post(path, body))
            refuse_redirect(upstream)
            self._process.heard()
            media_type = upstream.headers.get("Content-Type")
            if upstream.content_length is None and not whole:
                return _Stream(self._chunks(upstream), stack, upstream.status, media_type)
            answer = await upstream.read()
            if not is_of(upstream.headers.get(HEADER), answer):
                raise ServerDown("the server's answer was changed on its way here; ask again")
        except aiohttp.ClientError as error:
            raise ServerDown(
                f"the server process broke off this request ({type(error).__name__}); ask again"
            ) from error
        self._process.heard()
        self._count_tokens(answer)
        return Response(answer, upstream.status, media_type=media_type)

    async def _chunks(self, upstream: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        async for chunk in upstream.content.iter_chunked(_STREAM_BYTES):
            self._process.heard()
            yield chunk

    def _count_tokens(self, answer: bytes) -> None:
        try:
            usage = json.loads(answer).get("usage") or {}
        except (ValueError, AttributeError):
            return  # an error's text; it has no tokens
        for kind in ("prompt_tokens", "completion_tokens"):
            self._metrics.tokens.labels(kind.removesuffix("_tokens")).inc(usage.get(kind) or 0)


class _Stream(StreamingResponse):
    """A stream that lets go of the request's versions when it ends, however it ends."""

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        stack: AsyncExitStack,
        status: int,
        media_type: str | None,
    ) -> None:
        super().__init__(chunks, status, media_type=media_type)
        self._stack = stack.pop_all()

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        async with self._stack:
            await super().__call__(scope, receive, send)
