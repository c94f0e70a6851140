"""Answers, held against the types of OpenAI's own client.

The client builds its types without checking them; here they are validated, and nothing may be left
out that the documentation has, or be there that it has not.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel


def post(url: str, **body: Any) -> httpx.Response:
    """A chat request; a field of None is sent as null."""
    return httpx.post(
        f"{url}/v1/chat/completions",
        content=json.dumps(body),
        headers={"Content-Type": "application/json"},
        timeout=60,
    )


def _no_more_than_known(value: Any) -> None:
    if isinstance(value, BaseModel):
        assert not value.model_extra, f"{type(value).__name__}: {value.model_extra}"
        for name in type(value).model_fields:
            _no_more_than_known(getattr(value, name))
    elif isinstance(value, list):
        for one in value:
            _no_more_than_known(one)


def completion(answer: httpx.Response) -> ChatCompletion:
    """A whole answer."""
    assert answer.status_code == 200, answer.text
    body = answer.json()
    found = ChatCompletion.model_validate(body, strict=True)
    _no_more_than_known(found)
    for choice in body["choices"]:  # null where it does not apply, and never left out
        assert {"logprobs", "finish_reason"} < set(choice)
        assert {"content", "refusal", "role"} == set(choice["message"])
    return found


def chunks(answer: httpx.Response) -> list[ChatCompletionChunk]:
    """A stream that was not broken off."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    bodies = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    found = [ChatCompletionChunk.model_validate(body, strict=True) for body in bodies]
    for chunk, body in zip(found, bodies, strict=True):
        _no_more_than_known(chunk)
        for choice in body["choices"]:
            assert {"index", "delta", "logprobs", "finish_reason"} == set(choice)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in found}) == 1
    return found


def model(body: Any) -> Model:
    found = Model.model_validate(body, strict=True)
    _no_more_than_known(found)
    return found


def problem(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer that is one."""
    assert answer.status_code >= 400, answer.text
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and isinstance(error["type"], str)
    assert all(error[name] is None or isinstance(error[name], str) for name in ("param", "code"))
    return error
