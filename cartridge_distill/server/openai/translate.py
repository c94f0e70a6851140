"""An OpenAI chat request as a request of the Tokasaurus protocol.

The protocol is what engines understand here, the embedded one and Tokasaurus alike. Log-probs and
streams are not part of the translation: the caller makes them of what the engine gives.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from cartridge_distill.rollout.protocol import (
    CartridgeChatCompletionRequest,
    CartridgeRef,
    ChatCompletionRequest,
)
from cartridge_distill.server.openai.errors import ApiError
from cartridge_distill.server.openai.requests import ChatRequest, text_of

DEFAULT_MAX_TOKENS = 512
DEFAULT_TEMPERATURE = 1.0


def to_protocol(
    request: ChatRequest, cartridge: str | None, max_tokens: int
) -> ChatCompletionRequest:
    """The request in the protocol's words.

    Args:
        cartridge: id of the cartridge that the model's name stands for, or None for the bare model.
        max_tokens: bound on the answer.

    Raises:
        ApiError: 400, there is nothing to answer, or a value is beyond the protocol's bounds.
    """
    messages = [
        # Templates know the role by its older name.
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": text_of(message),
        }
        for message in request.messages
    ]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()  # an answer that is begun with nothing is a new answer
    if not messages:
        raise ApiError(
            400, "Invalid 'messages': there is only an empty answer.", "messages", "invalid_value"
        )
    body: dict[str, Any] = {
        "model": request.model,
        "messages": messages,
        "max_tokens": max_tokens,
        "n": request.n or 1,
        "seed": request.seed,
        "stop": request.stops or None,
        "temperature": (
            DEFAULT_TEMPERATURE if request.temperature is None else request.temperature
        ),
    }
    if cartridge is None and messages[-1]["role"] == "system":
        # The protocol goes on with any last message that is not the user's.
        generate = {"add_generation_prompt": True, "continue_final_message": False}
        body["apply_chat_template_overrides"] = generate
    try:
        if cartridge is None:
            return ChatCompletionRequest(**body)
        ref = CartridgeRef(id=cartridge, source="local")
        return CartridgeChatCompletionRequest(**body, cartridges=[ref])
    except ValidationError as error:  # the protocol's bounds are narrower
        # Of a union every alternative complains; the last one is the list.
        problem = error.errors(include_input=False)[-1]
        place = str(problem["loc"][0])
        message = f"Invalid '{place}': {problem['msg']}."
        raise ApiError(400, message, place, "invalid_value") from error
