"""The Tokasaurus protocol on the wire: request and response models, names of cartridges.

Written against the branch of Tokasaurus that serves cartridges (``geoff/cartridges``). Both ends of
this project use it: the client sends and decodes with it, the embedded server validates and encodes
with it, so the two cannot drift apart. Requests forbid unknown fields, as the real server does
(HTTP 422), and everything in them has a bound, which the real server does not have
(:mod:`cartridge_distill.rollout.limits`). Responses are read leniently: a server may add fields, it
may not leave ours out.

Token ids and log-probs of a completion travel packed in ``system_fingerprint``, see
:mod:`cartridge_distill.rollout.fingerprint`.

This module does no I/O. Files and batches of the protocol are left out: nothing here uses them.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cartridge_distill.rollout.limits import (
    MAX_CARTRIDGES,
    MAX_LOGIT_BIASES,
    MAX_MESSAGES,
    MAX_METADATA,
    MAX_PROMPTS,
    MAX_STOPS,
    MAX_TEXT_PARTS,
    Choices,
    LongText,
    Name,
    Real,
    Seed,
    ShortText,
    Stop,
    Temperature,
    TokenIds,
    Whole,
)

_FORBID = ConfigDict(extra="forbid")
_LENIENT = ConfigDict(extra="ignore")


# --- requests ---------------------------------------------------------------------------------


class CartridgeRef(BaseModel):
    """Which cartridge to put before the prompt.

    ``force_redownload`` is part of the protocol and fixes nothing: the server never loads an id
    twice. New weights need a new id.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Name
    source: Literal["wandb", "local", "huggingface"] = "wandb"
    force_redownload: bool = False


class StreamOptions(BaseModel):
    """Accepted, without effect."""

    model_config = _FORBID

    include_usage: bool | None = False


Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]
LogitBias = Annotated[dict[ShortText, Real], Field(max_length=MAX_LOGIT_BIASES)]
Metadata = Annotated[dict[ShortText, Any], Field(max_length=MAX_METADATA)]
Cartridges = Annotated[list[CartridgeRef], Field(max_length=MAX_CARTRIDGES, fail_fast=True)]


class CompletionRequest(BaseModel):
    """Body of ``POST /v1/completions``; ``prompt`` is text or one flat list of token ids."""

    model_config = _FORBID

    model: Name
    prompt: (
        TokenIds
        | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True)]
        | LongText
        | Annotated[list[LongText], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    )
    best_of: Whole | None = None
    echo: bool | None = False
    frequency_penalty: Real | None = 0.0
    logit_bias: LogitBias | None = None
    logprobs: Whole | None = None
    max_tokens: Whole | None = 16
    n: Choices = 1
    presence_penalty: Real | None = 0.0
    seed: Seed | None = None
    stop: Stops | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    suffix: LongText | None = None
    temperature: Temperature | None = 1.0
    top_p: Real | None = 1.0
    user: ShortText | None = None
    metadata: Metadata | None = None
    logprobs_in_fingerprint: bool = False
    ignore_eos: bool = False


class CartridgeCompletionRequest(CompletionRequest):
    """Body of ``POST /custom/cartridge/completions``."""

    cartridges: Cartridges | None = None


class TextPart(BaseModel):
    """The one kind of content part that is served."""

    model_config = _FORBID

    type: Literal["text"]
    text: LongText


class ChatMessage(BaseModel):
    """One message; content is a string or a list with a single text part."""

    model_config = _FORBID

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: LongText | Annotated[list[TextPart], Field(max_length=MAX_TEXT_PARTS, fail_fast=True)]
    name: ShortText | None = None


class JsonSchemaFormat(BaseModel):
    """Accepted, without effect."""

    model_config = _FORBID

    name: ShortText
    description: LongText | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = False


class ResponseFormat(BaseModel):
    """Accepted, without effect."""

    model_config = _FORBID

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class TemplateSwitches(BaseModel):
    """What a request may set of how its messages are rendered.

    The real server passes on whatever it is given. One of these names is ``chat_template``: a
    program of the client's, which may run for ever. So here are the switches that the templates of
    served models know, and no others.
    """

    model_config = _FORBID

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    enable_thinking: bool | None = None
    thinking: bool | None = None
    preserve_thinking: bool | None = None
    tools_in_user_message: bool | None = None
    reasoning_effort: ShortText | None = None
    date_string: ShortText | None = None


class ChatCompletionRequest(BaseModel):
    """Body of ``POST /v1/chat/completions``."""

    model_config = _FORBID

    messages: Annotated[list[ChatMessage], Field(max_length=MAX_MESSAGES, fail_fast=True)]
    model: Name
    frequency_penalty: Real | None = 0.0
    logit_bias: LogitBias | None = None
    logprobs: bool | None = False
    top_logprobs: Whole | None = None
    max_tokens: Whole | None = None
    max_completion_tokens: Whole | None = None
    n: Choices | None = 1
    presence_penalty: Real | None = 0.0
    response_format: ResponseFormat | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = 0.7
    top_p: Real | None = 1.0
    user: ShortText | None = None
    metadata: Metadata | None = None
    ignore_eos: bool = False
    logprobs_in_fingerprint: bool = False
    apply_chat_template_overrides: TemplateSwitches | None = None


class CartridgeChatCompletionRequest(ChatCompletionRequest):
    """Body of ``POST /custom/cartridge/chat/completions``."""

    cartridges: Cartridges | None = None


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
