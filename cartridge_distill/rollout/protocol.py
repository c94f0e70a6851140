"""The Tokasaurus protocol on the wire: request and response models, names of cartridges.

Written against the branch of Tokasaurus that serves cartridges (``geoff/cartridges``). Both ends of
this project use it: the client sends and decodes with it, the embedded server validates and encodes
with it, so the two cannot drift apart. Requests forbid unknown fields, as the real server does
(HTTP 422). Responses are read leniently: a server may add fields, it may not leave ours out.

Token ids and log-probs of a completion travel packed in ``system_fingerprint``, see
:mod:`cartridge_distill.rollout.fingerprint`.

This module does no I/O. Files and batches of the protocol are left out: nothing here uses them.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_FORBID = ConfigDict(extra="forbid")
_LENIENT = ConfigDict(extra="ignore")


# --- requests ---------------------------------------------------------------------------------


class CartridgeRef(BaseModel):
    """Which cartridge to put before the prompt.

    ``force_redownload`` is part of the protocol and fixes nothing: the server never loads an id
    twice. New weights need a new id.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    source: Literal["wandb", "local", "huggingface"] = "wandb"
    force_redownload: bool = False


class StreamOptions(BaseModel):
    """Accepted, without effect."""

    model_config = _FORBID

    include_usage: bool | None = False


class CompletionRequest(BaseModel):
    """Body of ``POST /v1/completions``; ``prompt`` is text or one flat list of token ids."""

    model_config = _FORBID

    model: str
    prompt: list[int] | list[list[int]] | str | list[str]
    best_of: int | None = None
    echo: bool | None = False
    frequency_penalty: float | None = 0.0
    logit_bias: dict[str, float] | None = None
    logprobs: int | None = None
    max_tokens: int | None = 16
    n: int = 1
    presence_penalty: float | None = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    suffix: str | None = None
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    user: str | None = None
    metadata: dict[str, Any] | None = None
    logprobs_in_fingerprint: bool = False
    ignore_eos: bool = False


class CartridgeCompletionRequest(CompletionRequest):
    """Body of ``POST /custom/cartridge/completions``."""

    cartridges: list[CartridgeRef] | None = None


class TextPart(BaseModel):
    """The one kind of content part that is served."""

    model_config = _FORBID

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message; content is a string or a list with a single text part."""

    model_config = _FORBID

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None


class JsonSchemaFormat(BaseModel):
    """Accepted, without effect."""

    model_config = _FORBID

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = False


class ResponseFormat(BaseModel):
    """Accepted, without effect."""

    model_config = _FORBID

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class ChatCompletionRequest(BaseModel):
    """Body of ``POST /v1/chat/completions``."""

    model_config = _FORBID

    messages: list[ChatMessage]
    model: str
    frequency_penalty: float | None = 0.0
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = 1
    presence_penalty: float | None = 0.0
    response_format: ResponseFormat | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = 0.7
    top_p: float | None = 1.0
    user: str | None = None
    metadata: dict[str, Any] | None = None
    ignore_eos: bool = False
    logprobs_in_fingerprint: bool = False
    apply_chat_template_overrides: dict[str, Any] | None = None


class CartridgeChatCompletionRequest(ChatCompletionRequest):
    """Body of ``POST /custom/cartridge/chat/completions``."""

    cartridges: list[CartridgeRef] | None = None


# --- responses --------------------------------------------------------------------------------


class PromptTokensDetails(BaseModel):
    model_config = _LENIENT

    cached_tokens: int | None = 0


class Usage(BaseModel):
    """Token counts, summed over the n choices; cartridge tokens are not counted."""

    model_config = _LENIENT

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class _Choice(BaseModel):
    model_config = _LENIENT

    index: int
    logprobs: Any = None
    finish_reason: str


class _Response(BaseModel):
    model_config = _LENIENT

    id: str
    created: int
    model: str
    usage: Usage | None = None
    system_fingerprint: str


class CompletionChoice(_Choice):
    text: str


class CompletionResponse(_Response):
    """Answer of both completions paths."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ChatAnswer(BaseModel):
    model_config = _LENIENT

    role: Literal["assistant"] = "assistant"
    content: str | None


class ChatChoice(_Choice):
    message: ChatAnswer


class ChatCompletionResponse(_Response):
    """Answer of both chat paths."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ModelCard(BaseModel):
    model_config = _LENIENT

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = ""


class ModelList(BaseModel):
    """Answer of ``GET /v1/models``."""

    model_config = _LENIENT

    object: Literal["list"] = "list"
    data: list[ModelCard]


# --- ids --------------------------------------------------------------------------------------


def sanitise_cartridge_id(cartridge_id: str) -> str:
    """The directory name under which the server looks for a cartridge.

    Slashes become ``-``; ``: | * ? < > " '`` and control characters become ``_``; so does each run
    of dots; each run of two or more ``-``/``_`` becomes one ``_``. Ids of ``[A-Za-z0-9]`` with
    single ``-`` or ``_`` are their own directory name: use those. The result never contains a
    separator and is never ``..``.

    Raises:
        ValueError: an empty or blank id.
    """
    if not cartridge_id.strip():
        raise ValueError(f"cartridge id {cartridge_id!r} is empty; give it a name")
    name = re.sub(r"[/\\]", "-", cartridge_id)
    name = re.sub(r"[:|*?<>\"'\x00-\x1f\x7f]", "_", name)
    name = re.sub(r"\.+", "_", name)
    name = re.sub(r"[-_]{2,}", "_", name.strip())
    if name in ("", "_"):
        # Nothing readable is left. The real server takes Python's salted hash() here, which differs
        # between its own processes; a stable one at least finds the same directory again.
        name = "sanitized_" + hashlib.sha256(cartridge_id.encode()).hexdigest()[:12]
    return name
