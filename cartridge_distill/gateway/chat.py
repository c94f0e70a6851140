"""OpenAI's chat API in front of any server of the Tokasaurus protocol.

``model`` in a request is the base model's name, or the id of a version that is here. A request is
translated, passed on like a rollout's, and its answer is translated back. The server computes the
whole answer first: a stream begins when it is ready. Log-probs are refused: the strings of tokens
need a tokenizer, which the gateway does not load (``cartridge-distill serve`` has them).
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from fastapi import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from cartridge_distill.gateway.completions import Completions
from cartridge_distill.gateway.settings import GatewaySettings
from cartridge_distill.gateway.store import VersionStore
from cartridge_distill.gateway.version_info import Unknown
from cartridge_distill.rollout.protocol import ChatCompletionResponse
from cartridge_distill.server.openai.answers import (
    DONE,
    AnswerMessage,
    ChatCompletion,
    Choice,
    Chunks,
    ModelCard,
    PromptDetails,
    Usage,
)
from cartridge_distill.server.openai.errors import ApiError, model_not_found
from cartridge_distill.server.openai.requests import ChatRequest
from cartridge_distill.server.openai.translate import DEFAULT_MAX_TOKENS, to_protocol
from cartridge_distill.util.disconnect import CLIENT_WENT_AWAY
from cartridge_distill.util.http_errors import shortened

_PLAIN, _WITH_CARTRIDGE = "/v1/chat/completions", "/custom/cartridge/chat/completions"


def is_openai(path: str) -> bool:
    """Whether a path belongs to OpenAI's chat API, whose errors have a form of their own."""
    return path in (_PLAIN, "/v1/models") or path.startswith("/v1/models/")


def error_body(path: str, status: int, words: str) -> dict[str, Any]:
    """The body of an error, in the form that the path's clients know."""
    return ApiError(status, words).body if is_openai(path) else {"detail": shortened(words)}


class Chat:
    """The way of a chat request through the gateway."""

    def __init__(
        self, settings: GatewaySettings, store: VersionStore, completions: Completions
    ) -> None:
        self._settings, self._store, self._completions = settings, store, completions
        self._created = int(time.time())

    def card(self, model: str) -> ModelCard:
        """The base model's card, or a version's.

        Raises:
            ApiError: 404, the model is not here.
        """
        base = self._settings.base_model
        if model != base:
            try:
                self._store.info(model)
            except Unknown as error:
                here = [base, *(info.id for info in self._store.infos)]
                raise model_not_found(model, here) from error
        return ModelCard(id=model, created=self._created, owned_by="cartridge-distill")

    async def answer(self, request: ChatRequest, http: Request) -> Response:
        """Translates a request, asks the server, and translates its answer.

        Raises:
            ApiError: 400 or 404, this is not served here.
            Busy, ServerDown, Unknown: as :meth:`Completions.ask`.
        """
        self.card(request.model)
        if request.logprobs:
            raise ApiError(
                400,
                "Unsupported value: 'logprobs' is not supported by the gateway. Leave it out, or "
                "ask 'cartridge-distill serve'; /custom/cartridge/chat/completions has log-probs "
                "in its fingerprint.",
                "logprobs",
                "unsupported_value",
            )
        cartridge = None if request.model == self._settings.base_model else request.model
        max_tokens = request.max_new_tokens or min(
            DEFAULT_MAX_TOKENS, self._settings.max_request_tokens
        )
        asked = to_protocol(request, cartridge, max_tokens)
        body = asked.model_dump_json(exclude_none=True, exclude_unset=True).encode()
        path = _PLAIN if cartridge is None else _WITH_CARTRIDGE
        try:
            came = await self._completions.ask(asked, http, path, body, whole=True)
        except HTTPException as error:
            raise ApiError(error.status_code, str(error.detail)) from error
        if came.status_code == CLIENT_WENT_AWAY:
            return came
        if came.status_code != 200:
            raise ApiError(came.status_code, _detail(bytes(came.body)))
        answer = ChatCompletionResponse.model_validate_json(bytes(came.body))
        done = self._translated(request, answer)
        if request.stream:
            return StreamingResponse(
                iter(_events(done, request.wants_usage)),
                headers={"Cache-Control": "no-cache"},
                media_type="text/event-stream",
            )
        return JSONResponse(done.model_dump())

    def _translated(self, request: ChatRequest, came: ChatCompletionResponse) -> ChatCompletion:
        choices = [
            Choice(
                index=choice.index,
                message=AnswerMessage(content=choice.message.content or ""),
                logprobs=None,
                finish_reason="length" if choice.finish_reason == "length" else "stop",
            )
            for choice in sorted(came.choices, key=lambda choice: choice.index)
        ]
        usage = came.usage
        if usage is None:
            raise ApiError(502, "the server's answer has no token counts")
        # The protocol counts the prompt once for each choice.
        prompt = usage.prompt_tokens // len(choices)
        details = usage.prompt_tokens_details
        cached = (details.cached_tokens or 0) if details is not None else 0
        return ChatCompletion(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=request.model,
            choices=choices,
            usage=Usage(
                prompt_tokens=prompt,
                completion_tokens=usage.completion_tokens,
                total_tokens=prompt + usage.completion_tokens,
                # At least so many had every choice.
                prompt_tokens_details=PromptDetails(
                    cached_tokens=max(0, cached - prompt * (len(choices) - 1))
                ),
            ),
        )


def _detail(body: bytes) -> str:
    """The server's words."""
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")


def _events(done: ChatCompletion, with_usage: bool) -> list[str]:
    """A finished answer as a stream."""
    chunks = Chunks(done.id, done.created, done.model, with_usage)
    events = [chunks.begin(choice.index) for choice in done.choices]
    for choice in done.choices:
        if choice.message.content:
            events.append(chunks.text(choice.index, choice.message.content, None))
        events.append(chunks.end(choice.index, choice.finish_reason))
    if with_usage:
        events.append(chunks.usage(done.usage))
    return [*events, DONE]
