"""The routes of ``cartridge-distill serve``: OpenAI's chat API, each cartridge a model of its own.

``model`` in a request is a cartridge's name, or the base model's for an answer without one. Tokens
are streamed as they come. Whatever can be refused is refused before a stream begins.

A document that the server knows is a model, too: the base model that has read it.

Served: ``GET /v1/models``, ``GET /v1/models/{id}``, ``POST /v1/chat/completions``, ``GET /ping``,
``GET /health``; the page at ``/`` is ``playground``.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.server.answering import Admitted, Answering
from cartridge_distill.server.app import app_over
from cartridge_distill.server.cartridges import CartridgeRefused
from cartridge_distill.server.openai.answers import (
    CHAT_RESPONSES,
    DONE,
    ERRORS,
    AnswerMessage,
    ChatCompletion,
    Choice,
    Chunks,
    Logprobs,
    ModelCard,
    ModelCards,
    PromptDetails,
    Usage,
    event,
)
from cartridge_distill.server.openai.errors import (
    ApiError,
    add_error_handlers,
    error_body,
    model_not_found,
)
from cartridge_distill.server.openai.requests import ChatRequest
from cartridge_distill.server.openai.text import AnswerText, Piece
from cartridge_distill.server.openai.tokens import TokenStrings
from cartridge_distill.server.openai.translate import DEFAULT_MAX_TOKENS, to_protocol
from cartridge_distill.server.protocol import Refused, TooLong
from cartridge_distill.server.rows import NewToken
from cartridge_distill.util.disconnect import unless_disconnected
from cartridge_distill.util.disk import DiskFailed
from cartridge_distill.util.http_errors import protect
from cartridge_distill.util.known_hosts import KnownHosts, OnlyKnownHosts


def create_openai_app(
    service: Answering,
    cartridges: Mapping[str, str],
    hosts: KnownHosts | None = None,
    documents: Mapping[str, Sequence[int]] | None = None,
) -> FastAPI:
    """The routes. The engine's thread starts and stops with the app.

    Args:
        cartridges: cartridge id in the service's directory, by the model name that asks for it.
        hosts: names of the server; other requests are refused. The loopback's by default.
        documents: token ids of a document, by the model name that asks the base model behind it.
    """

    texts = documents or {}
    app = app_over(service, "Cartridges, OpenAI's chat API")
    protect(app, service.idle_s, error_body=error_body)
    app.add_middleware(OnlyKnownHosts, hosts=hosts or KnownHosts())
    add_error_handlers(app)
    created = int(time.time())
    cards = {
        name: ModelCard(id=name, created=created, owned_by="cartridge-distill")
        for name in (service.model_name, *cartridges, *texts)
    }
    strings = TokenStrings(service.tokenizer)

    def card(name: str) -> ModelCard:
        if name not in cards:
            raise model_not_found(name, list(cards))
        return cards[name]

    @app.get("/ping")
    async def ping() -> dict[str, str]:
        return {"message": "pong"}

    @app.get("/health", responses=ERRORS)
    async def health() -> dict[str, str]:
        if not service.is_alive:
            raise ApiError(503, "the engine has ended: nothing is computed; start the server again")
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> ModelCards:
        return ModelCards(data=list(cards.values()))

    @app.get("/v1/models/{model:path}", responses=ERRORS)  # names of models hold slashes
    async def one_model(model: str) -> ModelCard:
        return card(model)

    @app.post("/v1/chat/completions", responses=CHAT_RESPONSES, response_class=JSONResponse)
    async def chat(request: ChatRequest, http: Request) -> Response:
        card(request.model)
        answer = _Answer(service, strings, request)
        await answer.admit(cartridges.get(request.model), texts.get(request.model, ()))
        if request.stream:
            headers = {"Cache-Control": "no-cache"}
            return StreamingResponse(
                answer.stream(), headers=headers, media_type="text/event-stream"
            )
        done = await unless_disconnected(http, answer.whole())
        if done is None:
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(done.model_dump())

    return app


class _Answer:
    """The way of one request through the engine."""

    def __init__(self, service: Answering, strings: TokenStrings, request: ChatRequest) -> None:
        self._service = service
        self._request = request
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._texts = [
            AnswerText(
                service.tokenizer,
                strings if request.logprobs else None,
                service.end_ids,
                request.stops,
            )
            for _ in range(request.n or 1)
        ]

    async def admit(self, cartridge: str | None, document: Sequence[int] = ()) -> None:
        """Everything that can be refused without computing.

        Args:
            cartridge: its id, for an answer behind one.
            document: token ids, for an answer behind these.

        Raises:
            ApiError: 400, with the reason; 507 where the disk of the cartridge fails.
        """
        asked = self._request.max_new_tokens
        try:
            # Without a bound the prompt alone must fit; the answer takes what is left.
            admitted = await self._service.admit(
                to_protocol(self._request, cartridge, asked or 1), document
            )
        except TooLong as error:
            raise ApiError(
                400,
                f"This model's maximum context length is {error.limit} tokens. You requested "
                f"{error.prompt + error.new} tokens ({error.prompt} in the messages, {error.new} "
                "in the completion). Shorten the messages or the completion.",
                "messages",
                "context_length_exceeded",
            ) from error
        except Refused as error:
            raise ApiError(400, str(error), "messages", "invalid_value") from error
        except CartridgeRefused as error:
            raise ApiError(400, str(error), "model", "invalid_value") from error
        except DiskFailed as error:
            raise ApiError(507, str(error)) from error
        if asked is None:
            left = self._service.limits.max_tokens_per_request - len(admitted.job.prompt_ids)
            job = replace(admitted.job, max_new_tokens=min(DEFAULT_MAX_TOKENS, left))
            admitted = replace(admitted, job=job)
        self._admitted: Admitted = admitted

    async def whole(self) -> ChatCompletion:
        """The answer when all of it is known.

        Raises:
            HTTPException: the engine failed.
        """
        came: list[tuple[int, NewToken]] = []
        results = await self._service.compute(
            self._admitted,
            lambda index, new: came.append((index, new)),
            self._request.top_logprobs or 0,
        )
        pieces: list[list[Piece]] = [[] for _ in results]
        for index, new in came:
            if (piece := self._texts[index].add(new)) is not None:
                pieces[index].append(piece)
        choices = []
        for index, result in enumerate(results):
            last, reason = self._texts[index].finish(result.finish_reason)
            pieces[index].append(last)
            message = AnswerMessage(content="".join(piece.text for piece in pieces[index]))
            entries = [entry for piece in pieces[index] for entry in piece.logprobs]
            logprobs = Logprobs(content=entries) if self._request.logprobs else None
            choices.append(
                Choice(index=index, message=message, logprobs=logprobs, finish_reason=reason)
            )
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._request.model,
            choices=choices,
            usage=self._usage(results),
        )

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events; closing the generator (the client went away) cancels the rows."""
        loop = asyncio.get_running_loop()
        came: asyncio.Queue[tuple[int, NewToken] | None] = asyncio.Queue()

        def on_token(index: int, new: NewToken) -> None:
            loop.call_soon_threadsafe(came.put_nowait, (index, new))

        work = asyncio.create_task(
            self._service.compute(self._admitted, on_token, self._request.top_logprobs or 0)
        )
        work.add_done_callback(lambda _: came.put_nowait(None))
        chunks = Chunks(self._id, self._created, self._request.model, self._request.wants_usage)
        try:
            for index in range(len(self._texts)):
                yield chunks.begin(index)
            while (item := await came.get()) is not None:
                index, new = item
                if (piece := self._texts[index].add(new)) is not None:
                    yield chunks.text(index, piece.text, self._logprobs(piece))
            try:
                results = await work
            except HTTPException as error:  # the status line is sent: the stream must say so
                yield event(ApiError(error.status_code, str(error.detail)).body)
                return
            for index, result in enumerate(results):
                piece, reason = self._texts[index].finish(result.finish_reason)
                if piece.text or piece.logprobs:
                    yield chunks.text(index, piece.text, self._logprobs(piece))
                yield chunks.end(index, reason)
            if self._request.wants_usage:
                yield chunks.usage(self._usage(results))
            yield DONE
        finally:
            work.cancel()

    def _logprobs(self, piece: Piece) -> Logprobs | None:
        return Logprobs(content=piece.logprobs) if self._request.logprobs else None

    def _usage(self, results: Sequence[Completion]) -> Usage:
        prompt = len(self._admitted.job.prompt_ids)
        new = sum(len(result.token_ids) for result in results)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=new,
            total_tokens=prompt + new,
            prompt_tokens_details=PromptDetails(
                cached_tokens=min(result.shared_tokens for result in results)
            ),
        )
