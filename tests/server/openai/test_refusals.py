"""What OpenAI's chat API refuses: with which status, for which parameter, in OpenAI's form."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from cartridge_distill.server.openai.requests import ChatRequest
from cartridge_distill.server.running import BackgroundServer
from tests.server.openai import strict

USER = {"role": "user", "content": "x"}
ASK: dict[str, Any] = {"model": "anna", "messages": [USER], "max_tokens": 2}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


def said(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(parts)}]}


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        # What cannot be done
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_value"),
        ({"response_format": SCHEMA}, "response_format", "unsupported_value"),
        ({"tools": [TOOL]}, "tools", "unsupported_value"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_value"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_value"),
        ({"function_call": {"name": "f"}}, "function_call", "unsupported_value"),
        ({"top_p": 0.5}, "top_p", "unsupported_value"),
        ({"top_p": True}, "top_p", "unsupported_value"),
        ({"frequency_penalty": 0.1}, "frequency_penalty", "unsupported_value"),
        ({"presence_penalty": False}, "presence_penalty", "unsupported_value"),
        ({"logit_bias": {"3": 1}}, "logit_bias", "unsupported_value"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_value"),
        ({"audio": {"voice": "a", "format": "wav"}}, "audio", "unsupported_value"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction", "unsupported_value"),
        ({"moderation": {"model": "m"}}, "moderation", "unsupported_value"),
        ({"web_search_options": {}}, "web_search_options", "unsupported_value"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_value"),
        ({"verbosity": "high"}, "verbosity", "unsupported_value"),
        ({"service_tier": "flex"}, "service_tier", "unsupported_value"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "unsupported_value",
        ),
        (said(IMAGE), "messages[0].content[0].type", "invalid_value"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "messages[1].role", None),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
            "messages[1].tool_calls",
            "unsupported_value",
        ),
        # What nobody knows
        ({"ignore_eos": True}, "ignore_eos", "unknown_parameter"),
        ({"logprobs_in_fingerprint": True}, "logprobs_in_fingerprint", "unknown_parameter"),
        ({"cartridges": []}, "cartridges", "unknown_parameter"),
        ({"messages": [USER | {"weight": 1}]}, "messages[0].weight", "unknown_parameter"),
        (
            {"stream": True, "stream_options": {"x": 1}},
            "stream_options.x",
            "unknown_parameter",
        ),
        # Wrong types
        ({"n": "2"}, "n", "invalid_type"),
        ({"n": 1.5}, "n", "invalid_type"),
        ({"n": True}, "n", "invalid_type"),
        ({"max_tokens": "5"}, "max_tokens", "invalid_type"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": False}, "temperature", "invalid_type"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"logprobs": 1}, "logprobs", "invalid_type"),
        ({"user": 3}, "user", "invalid_type"),
        ({"store": "yes"}, "store", "invalid_type"),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_type"),
        ({"stop": 3}, "stop", "invalid_type"),
        ({"stop": [3]}, "stop[0]", "invalid_type"),
        ({"model": None}, "model", "invalid_type"),
        ({"messages": "x"}, "messages", "invalid_type"),
        ({"messages": [3]}, "messages[0]", "invalid_type"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_type"),
        (said({"type": "text", "text": 3}), "messages[0].content[0].text", "invalid_type"),
        # Out of range
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"n": 129}, "n", "integer_above_max_value"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"temperature": -0.1}, "temperature", "decimal_below_min_value"),
        ({"temperature": 3}, "temperature", "decimal_above_max_value"),
        ({"seed": 2**63}, "seed", "integer_above_max_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
        ({"stop": list("abcde")}, "stop", "array_above_max_length"),
        ({"metadata": {"a": "b" * 513}}, "metadata.a", "string_above_max_length"),
        (
            {"metadata": {str(n): "" for n in range(17)}},
            "metadata",
            "object_above_max_length",
        ),
        ({"messages": []}, "messages", "empty_array"),
        (said(), "messages[0].content", "empty_array"),
        # What does not go together
        ({"max_completion_tokens": 2}, "max_tokens", "invalid_parameter_combination"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_parameter_combination"),
        ({"stream_options": {}}, "stream_options", "invalid_parameter_combination"),
        # What the model cannot take
        ({"messages": [{"role": "wizard", "content": ""}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages", "invalid_value"),
        ({"max_tokens": 600}, "messages", "context_length_exceeded"),
        ({"max_tokens": None, **said({"type": "text", "text": "x" * 600})}, "messages", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refused_by_name(
    served: BackgroundServer,
    changes: dict[str, Any],
    param: str | None,
    code: str | None,
    stream: bool,
) -> None:
    """A stream, too: with a status, before it begins."""
    if stream and changes.get("stream_options") == {}:
        changes = changes | {"stream": False}
    answer = strict.post(served.url, **({"stream": stream} | ASK | changes))
    assert answer.status_code == 400, answer.text
    error = strict.problem(answer)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert code is None or error["code"] == code
    if param is not None:
        named = param.removesuffix(".type").removesuffix(".role").split(".")[-1]
        assert (
            named in error["message"]
            or "Supported values" in error["message"]
            or "tokens" in (error["message"])
        )


def test_every_parameter_of_the_client_is_known() -> None:
    """One that a newer client sends is looked at before it is refused as unknown."""
    from openai.types.chat import completion_create_params as params

    known = {
        name
        for kind in (
            params.CompletionCreateParamsNonStreaming,
            params.CompletionCreateParamsStreaming,
        )
        for name in kind.__annotations__ | params.CompletionCreateParamsBase.__annotations__
    }
    assert len(known) > 30
    assert known == set(ChatRequest.model_fields)


def test_a_model_that_is_not_here(served: BackgroundServer, client: openai.OpenAI) -> None:
    answer = strict.post(served.url, **ASK | {"model": "carl"})
    assert answer.status_code == 404
    error = strict.problem(answer)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError, match="here are: org/base, anna, ben.v2"):
        client.chat.completions.create(**ASK | {"model": "carl"}, stream=True)


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/chat/completions", "{", 400),
        ("POST", "/v1/chat/completions", "[1]", 400),
        ("POST", "/v1/chat/completions", "null", 400),
        ("POST", "/v1/chat/completions", "", 400),
        ("POST", "/v1/chat/completions", b"\xff", 400),
        ("POST", "/v1/chat/completions", "[" * 100_000, 400),
        ("POST", "/v1/chat/completions", '{"n": ' + "9" * 5000 + "}", 400),
        ("POST", "/v1/chat/completions", json.dumps(ASK | {"temperature": float("nan")}), 400),
        ("POST", "/v1/chat/completions", json.dumps(ASK | {"user": "\ud800"}), 400),
        ("POST", "/v1/chat/completions", json.dumps(ASK | {"\ud800": 1}), 400),
        ("POST", "/v1/completions", "{}", 404),
        ("GET", "/v1/chat/completions/chatcmpl-1", None, 404),
        ("GET", "/v1/models/", None, 404),
        ("GET", "/v1/models/nobody", None, 404),
        ("DELETE", "/v1/models/anna", None, 405),
        ("GET", "/v1/chat/completions", None, 405),
        ("GET", "/nowhere", None, 404),
    ],
)
def test_whatever_goes_wrong_has_one_form(
    served: BackgroundServer, method: str, path: str, content: Any, status: int
) -> None:
    answer = httpx.request(
        method,
        served.url + path,
        content=content,
        headers={"Content-Type": "application/json"},
        timeout=60,
    )
    assert answer.status_code == status, answer.text
    strict.problem(answer)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/embeddings", "/chat/completions"])
def test_a_url_that_is_not_here_is_told_what_is(served: BackgroundServer, path: str) -> None:
    """Clients try others by default, or are given a base URL without /v1."""
    said = httpx.post(served.url + path, json=ASK).json()["error"]["message"]
    assert f"POST {path}" in said and "POST /v1/chat/completions" in said


def test_a_body_of_another_kind_is_told_so(served: BackgroundServer) -> None:
    """curl's -d without the header."""
    answer = httpx.post(
        f"{served.url}/v1/chat/completions",
        content=json.dumps(ASK),
        headers={"Content-Type": "application/x-www-form-urlencoded"},
    )
    assert answer.status_code == 400
    assert "Content-Type: application/json" in strict.problem(answer)["message"]


def test_an_engine_that_stops_in_the_middle_says_so_in_the_stream(
    served: BackgroundServer, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = RuntimeError("out of memory")
    forwards = iter(range(4))

    def failing(*arguments: Any) -> Any:
        if next(forwards, None) is None:
            raise broken
        return forward(*arguments)

    forward = served.service.engine._forward
    asked = ASK | {"max_tokens": 20, "temperature": 0}
    monkeypatch.setattr(served.service.engine, "_forward", failing)
    with pytest.raises(openai.APIError, match="out of memory"):
        list(client.chat.completions.create(**asked, stream=True))
    answer = strict.post(served.url, **asked)
    assert answer.status_code == 500
    assert strict.problem(answer)["type"] == "server_error"
    monkeypatch.undo()
    assert strict.post(served.url, **asked).status_code == 200
