"""What OpenAI's chat API answers: whole, as chunks of a stream, and the cards of models.

The fields are those of OpenAI's documentation that this project can fill. What is null there when
it does not apply (``refusal``, ``logprobs``) is null here.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, Field

Finish = Literal["stop", "length"]


class TopLogprob(BaseModel):
    """A token, with the log of its probability.

    Attributes:
        token: as text; a token that is no whole character is ``bytes:`` and its bytes as escapes.
        bytes: of the token in UTF-8; null where the vocabulary does not say (special tokens).
    """

    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprob(TopLogprob):
    """A token of an answer, and the likeliest tokens in its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """Of the tokens that an answer's text consists of, in order."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """The answer's text."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """One of n answers."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: Finish


class PromptDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int = Field(description="that no choice had to compute")


class Usage(BaseModel):
    """Token counts. The prompt counts once, however many choices there are; a cartridge's tokens
    do not count."""

    prompt_tokens: int
    completion_tokens: int = Field(description="of all choices, the end tokens included")
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ChatCompletion(BaseModel):
    """Answer of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(BaseModel):
    """What is new in a chunk: the role in a choice's first one, then pieces of text."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    refusal: None = None


class ChunkChoice(BaseModel):
    """What is new of one choice."""

    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: Finish | None = None


class Chunk(BaseModel):
    """One event of a stream; ``usage`` is there when it was asked for, and null but in the last."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Chunks:
    """The events of one stream, as text.

    Args:
        answer_id, created, model: the same in every chunk.
        with_usage: whether chunks have the field ``usage``.
    """

    def __init__(self, answer_id: str, created: int, model: str, with_usage: bool) -> None:
        self._common = {
            "id": answer_id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
        }
        self._with_usage = with_usage

    def begin(self, index: int) -> str:
        """The first event of a choice."""
        return self._choice(index, Delta(role="assistant", content="", refusal=None))

    def text(self, index: int, text: str, logprobs: Logprobs | None) -> str:
        """The next piece of a choice."""
        return self._choice(index, Delta(content=text), logprobs)

    def end(self, index: int, reason: Finish) -> str:
        """The last event of a choice."""
        return self._choice(index, Delta(), reason=reason)

    def usage(self, usage: Usage) -> str:
        """The event behind all choices."""
        return self._event([], usage)

    def _choice(
        self,
        index: int,
        delta: Delta,
        logprobs: Logprobs | None = None,
        reason: Finish | None = None,
    ) -> str:
        shown: dict[str, Any] = {
            "index": index,
            "delta": delta.model_dump(exclude_unset=True),
            "logprobs": None if logprobs is None else logprobs.model_dump(),
            "finish_reason": reason,
        }
        return self._event([shown], None)

    def _event(self, choices: list[dict[str, Any]], usage: Usage | None) -> str:
        body: dict[str, Any] = self._common | {"choices": choices}
        if self._with_usage:
            body["usage"] = None if usage is None else usage.model_dump()
        return event(body)


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body)}\n\n"


DONE = "data: [DONE]\n\n"


class ModelCard(BaseModel):
    """A model that can be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelCards(BaseModel):
    """Answer of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorContent(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer that is an error."""

    error: ErrorContent


# What a route may answer, for its description. With 4XX among it FastAPI adds no status 422.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer},
    "5XX": {"model": ErrorAnswer},
}
CHAT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": ChatCompletion, "content": {"text/event-stream": {"schema": {}}}},
    **ERRORS,
}
