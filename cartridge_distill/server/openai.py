"""OpenAI's chat API over the engine: each cartridge is a model of its own.

``model`` in a request is a cartridge's name, or the base model's for an answer without one. Tokens
are streamed as they come. For people and their tools; training talks Tokasaurus' protocol
(``app``), which this is not: no token ids, no log-probs in a fingerprint.

Served: ``GET /v1/models``, ``POST /v1/chat/completions``, ``GET /ping``. What the engine does not
sample with (top_p, penalties) is refused with HTTP 400.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from transformers import PreTrainedTokenizerBase

from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.rollout.protocol import (
    CartridgeChatCompletionRequest,
    CartridgeRef,
    ChatCompletionRequest,
)
from cartridge_distill.server.app import Service, app_over
from cartridge_distill.server.protocol import Job, answer_text, chat_response
from cartridge_distill.util.disconnect import unless_disconnected

DEFAULT_MAX_TOKENS = 512


def create_openai_app(service: Service, cartridges: Mapping[str, str]) -> FastAPI:
    """The routes.

    Args:
        cartridges: cartridge id in the service's directory, by the model name that asks for it.
    """

    app = app_over(service, "Cartridges, OpenAI's chat API")
    _add_errors(app)
    base = service.settings.model_name

    @app.get("/ping")
    async def ping() -> dict[str, str]:
        return {"message": "pong"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        created = int(time.time())
        cards = [
            {"id": name, "object": "model", "created": created, "owned_by": "cartridge-distill"}
            for name in (base, *cartridges)
        ]
        return {"object": "list", "data": cards}

    @app.post("/v1/chat/completions")
    async def chat(request: ChatCompletionRequest, http: Request) -> Response:
        if request.model not in (base, *cartridges):
            known = ", ".join((base, *cartridges))
            raise HTTPException(404, f"model {request.model!r} is not here; here are: {known}")
        request = _complete(request, cartridges.get(request.model))
        if request.stream:
            return StreamingResponse(_stream(service, request), media_type="text/event-stream")
        done = await unless_disconnected(http, service.generate(request))
        if done is None:
            return Response(status_code=499)  # nobody reads it
        job, results = done
        answer = chat_response(request, job, results, service.end_ids, service.tokenizer)
        return JSONResponse(answer.model_dump(exclude={"system_fingerprint"}))

    return app


def _complete(request: ChatCompletionRequest, cartridge: str | None) -> ChatCompletionRequest:
    """With a bound on the answer, and the cartridge that the model's name stands for."""
    changes = request.model_dump(exclude_unset=True)
    if request.max_tokens is None and request.max_completion_tokens is None:
        changes["max_tokens"] = DEFAULT_MAX_TOKENS
    if cartridge is None:
        return ChatCompletionRequest.model_validate(changes)
    ref = CartridgeRef(id=cartridge, source="local")
    return CartridgeChatCompletionRequest.model_validate(changes | {"cartridges": [ref]})


async def _stream(service: Service, request: ChatCompletionRequest) -> AsyncIterator[str]:
    """Server-sent events; closing the generator (the client went away) cancels the rows."""
    loop = asyncio.get_running_loop()
    came: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()

    def on_token(index: int, token: int) -> None:
        loop.call_soon_threadsafe(came.put_nowait, (index, token))

    work = asyncio.create_task(service.generate(request, on_token))
    work.add_done_callback(lambda _: came.put_nowait(None))
    chunk = _Chunks(request.model)
    texts = [
        _Text(service.tokenizer, service.end_ids, _stops(request)) for _ in range(request.n or 1)
    ]
    try:
        for index in range(len(texts)):
            yield chunk(index, {"role": "assistant", "content": ""})
        while (item := await came.get()) is not None:
            index, token = item
            if piece := texts[index].add(token):
                yield chunk(index, {"content": piece})
        try:
            job, results = await work
        except HTTPException as error:  # the status line is sent: the stream itself must say so
            yield f"data: {json.dumps(_error(str(error.detail), error.status_code))}\n\n"
            return
        for index, result in enumerate(results):
            whole = answer_text(result, job, service.end_ids, service.tokenizer)
            if piece := texts[index].rest(whole):
                yield chunk(index, {"content": piece})
            yield chunk(index, {}, result.finish_reason)
        if request.stream_options is not None and request.stream_options.include_usage:
            yield chunk.usage(job, results)
        yield "data: [DONE]\n\n"
    finally:
        work.cancel()


def _stops(request: ChatCompletionRequest) -> list[str]:
    return [request.stop] if isinstance(request.stop, str) else list(request.stop or [])


class _Chunks:
    """Events of one answer."""

    def __init__(self, model: str) -> None:
        self._common = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }

    def __call__(self, index: int, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": reason}
        return f"data: {json.dumps(self._common | {'choices': [choice]})}\n\n"

    def usage(self, job: Job, results: Sequence[Completion]) -> str:
        prompt = len(job.prompt_ids) * len(results)
        new = sum(len(result.token_ids) for result in results)
        usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        return f"data: {json.dumps(self._common | {'choices': [], 'usage': usage})}\n\n"


class _Text:
    """From token ids to text that is never taken back.

    Held back are half characters, and what may turn out to be the beginning of a stop string.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int], stops: Sequence[str]
    ) -> None:
        self._tokenizer, self._end_ids, self._stops = tokenizer, end_ids, stops
        self._ids: list[int] = []
        self._sent = ""

    def add(self, token: int) -> str:
        """What can be shown now that this token has come."""
        if token in self._end_ids:
            return ""
        self._ids.append(token)
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        if text.endswith("\ufffd"):
            return ""
        keep = len(text) - self._held_back(text)
        return self._send(text[:keep])

    def rest(self, whole: str) -> str:
        """What is left when the whole answer is known."""
        return self._send(whole)

    def _send(self, text: str) -> str:
        if not text.startswith(self._sent) or len(text) <= len(self._sent):
            return ""
        piece, self._sent = text[len(self._sent) :], text
        return piece

    def _held_back(self, text: str) -> int:
        """Characters from the first place on at which a stop string begins, or may begin."""
        places = [len(text)]
        for stop in self._stops:
            if (found := text.find(stop)) >= 0:
                places.append(found)
            places += [
                len(text) - length
                for length in range(1, min(len(stop), len(text)) + 1)
                if stop.startswith(text[len(text) - length :])
            ]
        return len(text) - min(places)


def _error(message: str, status: int) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(_error(str(error.detail), error.status_code), error.status_code)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(_error(f"{where}: {first['msg']}", 400), 400)
