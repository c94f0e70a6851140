"""The ASGI app: Tokasaurus' paths over one engine.

Served: ``GET /ping``, ``GET /v1/models``, ``POST /v1/completions``, ``POST /v1/chat/completions``,
``POST /custom/cartridge/completions``, ``POST /custom/cartridge/chat/completions``. Left out:
``/v1/files``, ``/v1/batches`` and the pickled ``synchronous-batch`` endpoints (HTTP 404).

``stream`` does what it does on the real server: ``/v1/chat/completions`` computes the whole answer
and sends it as one server-sent-events chunk; the other paths answer plain JSON.

Beyond the protocol, for people and tests: ``GET /custom/cartridge/loaded`` lists the ids this
server ever loaded.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from torch import nn
from transformers import PreTrainedTokenizerBase

from cartridge_distill.cartridge.kv_shape import text_config
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.rollout.protocol import (
    CartridgeChatCompletionRequest,
    CartridgeCompletionRequest,
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
)
from cartridge_distill.server.answering import (
    Admitted,
    Answering,
    end_token_ids,
    without_truncation,
)
from cartridge_distill.server.cartridges import CartridgeStore
from cartridge_distill.server.engine import Engine
from cartridge_distill.server.protocol import (
    AnyRequest,
    Job,
    Limits,
    chat_response,
    completion_response,
    longest_text,
    stop_check,
)
from cartridge_distill.server.rows import EngineError, NewToken, Row
from cartridge_distill.server.sampling import RequestSeeds
from cartridge_distill.server.settings import ServerSettings
from cartridge_distill.util.disconnect import CLIENT_WENT_AWAY, unless_disconnected
from cartridge_distill.util.http_errors import add_refusals, protect
from cartridge_distill.util.known_hosts import KnownHosts, OnlyKnownHosts


@dataclass(frozen=True)
class _WithPrefix(Admitted):
    """An admitted request with the prefix that stands before its prompt."""

    prefix: Prefix | None


class Service(Answering):
    """Model, cartridges and engine behind the routes.

    Args:
        model: from :func:`cartridge_distill.model.loading.load_model`; its attention implementation
            is taken over, so do not share it with a trainer.
        tokenizer: the model's.
        settings: see :class:`ServerSettings`.
        threads: torch threads for the engine.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        settings: ServerSettings,
        threads: int | None = None,
    ) -> None:
        config = text_config(model.config)
        self.settings = settings
        self.model_name, self.idle_s = settings.model_name, settings.idle_s
        self.tokenizer = without_truncation(tokenizer)
        self.engine = Engine(model, settings, threads)
        memory = int(settings.cartridge_memory_gb * 1024**3)
        self.store = CartridgeStore(settings.cartridge_dir, model, memory)
        most = settings.max_tokens_per_request or config.max_position_embeddings
        self.limits = Limits(most, config.vocab_size, longest_text(tokenizer, most))
        self.end_ids = end_token_ids(getattr(model, "generation_config", None), tokenizer)
        self._seeds = RequestSeeds(settings.seed)

    @property
    def loaded_ids(self) -> list[str]:
        return self.store.loaded_ids

    def start(self) -> None:
        self.engine.start()

    def stop(self) -> None:
        self.engine.stop()

    @property
    def is_alive(self) -> bool:
        return self.engine.is_alive

    async def admit(self, request: AnyRequest, document: Sequence[int] = ()) -> Admitted:
        job = await self.read_job(request, document)
        prefix = None
        if job.cartridges:  # reading files takes time
            prefix = await asyncio.to_thread(self.store.prefix, job.cartridges)
        return _WithPrefix(job, request.seed, prefix)

    async def compute(
        self,
        admitted: Admitted,
        on_token: Callable[[int, NewToken], None] | None = None,
        top_logprobs: int = 0,
    ) -> list[Completion]:
        assert isinstance(admitted, _WithPrefix)
        job = admitted.job
        ids = sorted(ref.id for ref in job.cartridges)
        futures = []
        try:
            generators = self._seeds.generators(job.prompt_ids, ids, job.num_choices, admitted.seed)
            for index, generator in enumerate(generators):
                row = Row(
                    prompt_ids=job.prompt_ids,
                    max_new_tokens=job.max_new_tokens,
                    temperature=job.temperature,
                    generator=generator,
                    prefix=admitted.prefix,
                    end_ids=frozenset() if job.ignore_eos else self.end_ids,
                    ends_with_stop=stop_check(job.stop, self.tokenizer),
                    on_token=partial(on_token, index) if on_token else None,
                    top_logprobs=top_logprobs,
                )
                futures.append(asyncio.wrap_future(self.engine.submit(row)))
            # Cancelling this (the client went away) cancels the rows with it.
            results = list(await asyncio.gather(*futures))
            self.store.used(ids)
            return results
        except EngineError as error:
            for future in futures:
                future.cancel()
            if not error.retryable:
                # Whatever these weights are, nobody had an answer of them.
                self.store.forget_unused(ids)
            status = 400
            if error.retryable:
                status = 503 if "shutting down" in str(error) else 500
            raise HTTPException(status, str(error)) from error


def _events(answer: ChatCompletionResponse) -> list[dict[str, Any]]:
    """A finished chat answer as the chunks that the real server streams."""
    common = {
        "id": answer.id,
        "object": "chat.completion.chunk",
        "created": answer.created,
        "model": answer.model,
    }

    def chunk(index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": reason}
        return common | {"choices": [choice]}

    chunks = [chunk(0, {"role": "assistant", "content": ""}, None)]
    chunks += [chunk(c.index, {"content": c.message.content}, None) for c in answer.choices]
    chunks += [chunk(c.index, {}, c.finish_reason) for c in answer.choices]
    return chunks


def app_over(service: Answering, title: str) -> FastAPI:
    """An application without routes; the engine starts and stops with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    return FastAPI(lifespan=lifespan, title=title)


def create_app(service: Answering, hosts: KnownHosts | None = None) -> FastAPI:
    """The routes.

    Args:
        hosts: names of the server; other requests are refused. The loopback's by default.
    """
    app = app_over(service, "Tokasaurus protocol, embedded server")
    app.state.service = service
    protect(app, service.idle_s)
    add_refusals(app)
    app.add_middleware(OnlyKnownHosts, hosts=hosts or KnownHosts())

    async def answered(
        request: AnyRequest,
        http: Request,
        answer: Callable[..., Response],
    ) -> Response:
        done = await unless_disconnected(http, service.generate(request))
        if done is None:
            return Response(status_code=CLIENT_WENT_AWAY)
        return await asyncio.to_thread(answer, request, *done)

    async def complete(request: CompletionRequest, http: Request) -> Response:
        return await answered(request, http, completion_answer)

    def completion_answer(
        request: CompletionRequest, job: Job, results: list[Completion]
    ) -> Response:
        answer = completion_response(request, job, results, service.end_ids, service.tokenizer)
        return JSONResponse(answer.model_dump())

    async def chat(request: ChatCompletionRequest, http: Request) -> Response:
        return await answered(request, http, chat_answer)

    def chat_answer(
        request: ChatCompletionRequest, job: Job, results: list[Completion]
    ) -> Response:
        answer = chat_response(request, job, results, service.end_ids, service.tokenizer)
        if request.stream and not isinstance(request, CartridgeChatCompletionRequest):
            lines = [f"data: {json.dumps(event)}\n\n" for event in _events(answer)]
            return StreamingResponse(iter([*lines, "data: [DONE]\n\n"]), media_type="text/plain")
        return JSONResponse(answer.model_dump())

    @app.get("/ping")
    async def ping() -> dict[str, str]:
        return {"message": "pong"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        card = {
            "id": service.model_name,
            "created": int(time.time()),
            "object": "model",
            "owned_by": "tokasaurus",
        }
        return {"object": "list", "data": [card]}

    @app.get("/custom/cartridge/loaded")
    async def loaded() -> dict[str, list[str]]:
        return {"ids": service.loaded_ids}

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http: Request) -> Response:
        return await complete(request, http)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatCompletionRequest, http: Request) -> Response:
        return await chat(request, http)

    @app.post("/custom/cartridge/completions")
    async def cartridge_completions(request: CartridgeCompletionRequest, http: Request) -> Response:
        return await complete(request, http)

    @app.post("/custom/cartridge/chat/completions")
    async def cartridge_chat_completions(
        request: CartridgeChatCompletionRequest, http: Request
    ) -> Response:
        return await chat(request, http)

    return app
