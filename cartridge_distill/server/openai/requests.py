"""What may be asked of ``POST /v1/chat/completions``: every parameter of OpenAI's documentation.

A parameter is *offered* (it does what is documented), *accepted* (it changes nothing in an answer:
``user``, ``store``, ``metadata``, ...) or *refused* by name with every value but the one that asks
for nothing (``top_p=1``, ``tools=[]``). Unknown parameters are refused, too. A null means that the
parameter is left out. Types are strict, as in OpenAI's API: ``"3"`` is no number.

This module knows no model: whether a prompt fits is decided later.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_CHOICES = 128
MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20


def _only(*accepted: Any, why: str) -> Any:
    """A type for a parameter that is refused with every value but these (and null)."""

    def check(value: Any, info: ValidationInfo) -> Any:
        for one in (None, *accepted):
            # True == 1 in Python; in JSON a boolean is no number.
            if value == one and isinstance(value, bool) == isinstance(one, bool):
                return value
        neutral = " or ".join(json.dumps(one) for one in accepted)
        raise PydanticCustomError(
            "unsupported_value",
            "Unsupported value: '{name}' is not supported here: {why}. Leave it out{or_neutral}.",
            {"name": info.field_name, "why": why, "or_neutral": neutral and f" or say {neutral}"},
        )

    schema = {"enum": [None, *accepted], "description": f"Refused otherwise: {why}."}
    return Annotated[Any, BeforeValidator(check), WithJsonSchema(schema)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Body):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class RefusalPart(_Body):
    """A piece of an assistant's message that refuses."""

    type: Literal["refusal"]
    refusal: str


TextParts = Annotated[list[TextPart], Field(min_length=1)]
AnswerParts = Annotated[
    list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]], Field(min_length=1)
]
_NO_TOOLS = "this model calls no tools"


class InstructionMessage(_Body):
    """A developer's or a system message; the two are the same here."""

    role: Literal["developer", "system"]
    content: str | TextParts
    name: str | None = Field(None, description="Accepted; templates have no place for it.")


class UserMessage(_Body):
    """What the user says."""

    role: Literal["user"]
    content: str | TextParts
    name: str | None = Field(None, description="Accepted; templates have no place for it.")


class AssistantMessage(_Body):
    """An earlier answer, in the form in which this API gave it; content may be null.

    As the last message it is the beginning of the answer, which goes on from it.
    """

    role: Literal["assistant"]
    content: str | AnswerParts | None = None
    refusal: str | None = None
    name: str | None = Field(None, description="Accepted; templates have no place for it.")
    annotations: _only([], why="this model searches nothing") = None  # type: ignore[valid-type]
    audio: _only(why="only text is served") = None  # type: ignore[valid-type]
    tool_calls: _only([], why=_NO_TOOLS) = None  # type: ignore[valid-type]
    function_call: _only(why=_NO_TOOLS) = None  # type: ignore[valid-type]


Message = Annotated[
    InstructionMessage | UserMessage | AssistantMessage, Field(discriminator="role")
]


class StreamOptions(_Body):
    """Of a stream."""

    include_usage: bool | None = None
    include_obfuscation: _only(  # type: ignore[valid-type]
        False, why="the size of chunks is not hidden"
    ) = None


class PromptCacheOptions(_Body):
    """Accepted, without effect."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m"] | None = None


_Key = Annotated[str, Field(max_length=64)]
_Value = Annotated[str, Field(max_length=512)]
_SAMPLING = "the engine samples by temperature alone"


class ChatRequest(_Body):
    """Body of ``POST /v1/chat/completions``."""

    # Offered
    model: str
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1, description="The old name of it.")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Accepted: no answer depends on it
    metadata: Annotated[dict[_Key, _Value], Field(max_length=16)] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    safety_identifier: str | None = None
    store: bool | None = None
    user: str | None = None

    # Refused, but for the value that asks for nothing
    audio: _only(why="only text is served") = None  # type: ignore[valid-type]
    frequency_penalty: _only(0, why=_SAMPLING) = None  # type: ignore[valid-type]
    function_call: _only("none", "auto", why=_NO_TOOLS) = None  # type: ignore[valid-type]
    functions: _only([], why=_NO_TOOLS) = None  # type: ignore[valid-type]
    logit_bias: _only({}, why=_SAMPLING) = None  # type: ignore[valid-type]
    modalities: _only(["text"], why="only text is served") = None  # type: ignore[valid-type]
    moderation: _only(why="nothing is moderated") = None  # type: ignore[valid-type]
    prediction: _only(why="nothing is predicted") = None  # type: ignore[valid-type]
    presence_penalty: _only(0, why=_SAMPLING) = None  # type: ignore[valid-type]
    reasoning_effort: _only(  # type: ignore[valid-type]
        why="the model's reasoning cannot be set"
    ) = None
    response_format: _only(  # type: ignore[valid-type]
        {"type": "text"}, why="answers are not held to JSON or to a schema"
    ) = None
    service_tier: _only(  # type: ignore[valid-type]
        "auto", "default", why="there is one tier"
    ) = None
    tool_choice: _only("none", "auto", why=_NO_TOOLS) = None  # type: ignore[valid-type]
    tools: _only([], why=_NO_TOOLS) = None  # type: ignore[valid-type]
    top_p: _only(1, why=_SAMPLING) = None  # type: ignore[valid-type]
    verbosity: _only("medium", why="length cannot be set so") = None  # type: ignore[valid-type]
    web_search_options: _only(  # type: ignore[valid-type]
        why="this model searches nothing"
    ) = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, body: Any) -> Any:
        try:
            json.dumps(body, ensure_ascii=False, default=repr).encode()
        except UnicodeEncodeError as error:
            raise PydanticCustomError(
                "invalid_unicode",
                "A string of the body holds {part}, half of a surrogate pair, which is no text.",
                {"part": ascii(error.object[error.start])},
            ) from error
        return body

    @model_validator(mode="after")
    def _goes_together(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise _apart(
                "max_tokens",
                "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not "
                "supported; leave 'max_tokens' out.",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise _apart(
                "top_logprobs",
                "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.",
            )
        if self.stream_options is not None and not self.stream:
            raise _apart(
                "stream_options",
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
            )
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings; an empty one stops nothing."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    @property
    def max_new_tokens(self) -> int | None:
        """The bound on the answer that was given, under either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def _apart(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("apart", "{message}", {"message": message, "at": param})


def text_of(message: InstructionMessage | UserMessage | AssistantMessage) -> str:
    """A message's content as one text: parts are joined as they are, null is empty."""
    content = message.content
    if content is None:
        return message.refusal or "" if isinstance(message, AssistantMessage) else ""
    if isinstance(content, str):
        return content
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)
