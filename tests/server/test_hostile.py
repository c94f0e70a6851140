"""Requests that no client of ours sends: refused in few words, bounded, never a 500."""

from __future__ import annotations

import asyncio
import json
import math
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedModel

from cartridge_distill.rollout.limits import (
    MAX_CARTRIDGES,
    MAX_CHOICES,
    MAX_MESSAGES,
    MAX_STOP_CHARS,
    MAX_STOPS,
)
from cartridge_distill.rollout.protocol import (
    CartridgeChatCompletionRequest,
    CartridgeCompletionRequest,
)
from cartridge_distill.server.openai.app import create_openai_app
from cartridge_distill.server.running import BackgroundServer
from cartridge_distill.util.http_front import MAX_JSON_BYTES
from tests.conftest import StartServer
from tests.server.asking import CHAT, COMPLETIONS, IDS, greedy, local, post, tokens
from tests.tiny import random_cartridge, write_cartridge

JSON = {"Content-Type": "application/json"}
CHATS = (CHAT, "/v1/chat/completions")
USER = [{"role": "user", "content": "x"}]


def post_raw(server: BackgroundServer, path: str, body: bytes) -> httpx.Response:
    return httpx.post(server.url + path, content=body, headers=JSON, timeout=60)


def raw(**fields: str) -> bytes:
    """A completion request whose fields are given as JSON text."""
    known = {"model": '"m"', "prompt": "[1, 2]", "max_tokens": "2"} | fields
    return b"{" + b",".join(f'"{k}": {v}'.encode() for k, v in known.items()) + b"}"


# --- what is no JSON ----------------------------------------------------------------------------

NUMBERS = ("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 5000)
FIELDS = ("max_tokens", "n", "seed", "temperature", "top_p", "logprobs", "metadata", "prompt")


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_that_are_none(refusing_server: BackgroundServer, number: str) -> None:
    for field in FIELDS:
        answer = post_raw(refusing_server, COMPLETIONS, raw(**{field: number}))
        assert answer.status_code == 400, (field, answer.text)
        assert len(answer.text) < 400 and "JSON" in answer.json()["detail"]
        nested = raw(metadata=f'{{"a": [{number}]}}')
        assert post_raw(refusing_server, COMPLETIONS, nested).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        raw(user='"\\ud800"'),
        raw(prompt='"\\udfff x"'),
        raw(model='"\\ud800"'),
        raw(metadata='{"\\ud800": 1}'),
        raw(user='"') + b'\xed\xa0\x80"}',
        raw(n='1, "n": 100'),
        raw(metadata='{"a": 1, "a": 2}'),
        raw(metadata="[" * 100_000),
        raw(metadata='{"a":' * 1000 + "1" + "}" * 1000),
        b"",
        b"[1",
        b"\x00",
        b"\xff\xfe",
    ],
    ids=range(13),
)
def test_bodies_that_are_none(refusing_server: BackgroundServer, body: bytes) -> None:
    for path in (COMPLETIONS, *CHATS):
        answer = post_raw(refusing_server, path, body)
        assert answer.status_code in (400, 422), answer.text
        assert len(answer.text) < 400
    assert post(refusing_server, COMPLETIONS, prompt=IDS).status_code == 200


# --- what is too much ---------------------------------------------------------------------------

TOO_MUCH: list[dict[str, Any]] = [
    {"n": MAX_CHOICES + 1},
    {"n": 10**7},
    {"n": 10**300},
    {"n": -(10**300)},
    {"max_tokens": 10**300},
    {"max_tokens": -(10**300)},
    {"seed": 2**64},
    {"seed": -(10**300)},
    {"logprobs": 10**30},
    {"best_of": 10**30},
    {"temperature": 1e300},
    {"top_p": 1e300},
    {"presence_penalty": -1e300},
    {"prompt": [2**40]},
    {"prompt": [[1]] * 300},
    {"prompt": ["x"] * 300},
    {"prompt": [None] * 300_000},
    {"prompt": [1] * 500_000 + ["x"]},
    {"stop": ["x"] * (MAX_STOPS + 1)},
    {"stop": "x" * (MAX_STOP_CHARS + 1)},
    {"stop": ["y" * 10**6]},
    {"cartridges": local("a") * (MAX_CARTRIDGES + 1)},
    {"cartridges": local("a" * 100_000)},
    {"model": "m" * 100_000},
    {"user": "u" * 100_000},
    {"suffix": "s" * 5_000_000},
    {"metadata": {str(n): n for n in range(100)}},
    {"logit_bias": {str(n): 1.0 for n in range(1025)}},
    {"surprise" * 100_000: 1},
    {f"surprise{n}": n for n in range(1000)},
]


@pytest.mark.parametrize(
    "body", TOO_MUCH, ids=[f"{n}-{list(b)[0][:20]}" for n, b in enumerate(TOO_MUCH)]
)
def test_more_than_a_request_may_bring(
    refusing_server: BackgroundServer, body: dict[str, Any]
) -> None:
    answer = post(refusing_server, COMPLETIONS, **({"prompt": IDS, "max_tokens": 2} | body))
    assert answer.status_code in (400, 422), answer.text[:300]
    assert len(answer.text) < 800  # whatever came, it does not come back


@pytest.mark.parametrize(
    "body",
    [
        {"messages": USER * (MAX_MESSAGES + 1)},
        {"messages": [{"role": "user"}] * 100_000},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 100}]},
        {"messages": [{"role": "user", "content": "x", "name": "n" * 10**5}]},
        {"n": 10**7},
        {"top_logprobs": 10**30},
        {"max_completion_tokens": 10**30, "max_tokens": None},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n" * 10**5}}},
    ],
    ids=range(8),
)
def test_more_than_a_chat_may_bring(
    refusing_server: BackgroundServer, body: dict[str, Any]
) -> None:
    answer = post(refusing_server, CHAT, **({"messages": USER, "max_tokens": 2} | body))
    assert answer.status_code in (400, 422), answer.text[:300]
    assert len(answer.text) < 800


def test_every_list_number_and_text_of_a_request_has_a_bound() -> None:
    """Read from the schema, so that a new field cannot be without one."""
    unbounded: list[str] = []

    def walk(node: Any, path: str) -> None:
        if isinstance(node, list):
            for item in node:
                walk(item, path)
        if not isinstance(node, dict):
            return
        bounds = {
            "string": ("maxLength", "enum", "const"),
            "array": ("maxItems",),
            "integer": ("maximum", "exclusiveMaximum"),
            "number": ("maximum",),
        }.get(str(node.get("type")))
        if bounds and not any(bound in node for bound in bounds):
            unbounded.append(path)
        for name, value in node.items():
            walk(value, f"{path}.{name}")

    for model in (CartridgeCompletionRequest, CartridgeChatCompletionRequest):
        walk(model.model_json_schema(), model.__name__)
    assert unbounded == []


def test_a_body_is_bounded_before_it_is_read(refusing_server: BackgroundServer) -> None:
    answer = post_raw(refusing_server, COMPLETIONS, b" " * (MAX_JSON_BYTES + 1))
    assert answer.status_code == 413 and answer.headers["connection"] == "close"
    largest = raw(prompt="[" + ",".join(["7"] * 1_000_000) + "]")
    assert post_raw(refusing_server, COMPLETIONS, largest).status_code == 400  # over the context


def test_text_longer_than_any_prompt_is_not_tokenized(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server(max_tokens_per_request=64)
    limit = server.service.limits.max_text_chars
    longest = max(map(len, server.service.tokenizer.get_vocab()))
    assert limit == 64 * longest

    def tokenized(*_: Any, **__: Any) -> Any:
        raise AssertionError("the tokenizer was given all of it")

    answers = [
        post(server, COMPLETIONS, prompt="x" * limit, max_tokens=2),  # looked at, and too long
    ]
    monkeypatch.setattr(type(server.service.tokenizer), "__call__", tokenized)
    text = "x" * (limit + 1)
    answers += [
        post(server, COMPLETIONS, prompt=text, max_tokens=2),
        *(
            post(server, path, messages=[USER[0] | {"content": text}], max_tokens=2)
            for path in CHATS
        ),
        post(server, CHAT, messages=[USER[0] | {"content": text[:200]}] * 20, max_tokens=2),
    ]
    for answer in answers:
        assert answer.status_code == 400, answer.text
        assert "maximum number of tokens" in answer.json()["detail"]


def test_others_are_answered_while_a_long_text_is_read(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizing leaves the event loop: it goes on although a tokenizer waits."""
    server = start_server()
    tokenizer = type(server.service.tokenizer)
    real, loop_went_on = tokenizer.__call__, []

    def waiting(self: Any, text: Any, *args: Any, **named: Any) -> Any:
        if text == "wait":
            # From within the tokenizer: would be answered never, if the event loop stood still.
            loop_went_on.append(httpx.get(server.url + "/ping", timeout=30).status_code)
        return real(self, text, *args, **named)

    monkeypatch.setattr(tokenizer, "__call__", waiting)
    assert post(server, COMPLETIONS, prompt="wait", max_tokens=2).status_code == 200
    assert loop_went_on == [200]


def test_cartridges_that_are_together_too_large(
    start_server: StartServer, llama: PreTrainedModel, tmp_path: Path
) -> None:
    size = 0
    for name in "abc":
        cartridge = random_cartridge(llama, 16, ord(name))
        size = sum(t.numel() * 4 for t in cartridge.state_dict().values())
        write_cartridge(cartridge, tmp_path, name)
    server = start_server(cartridge_memory_gb=2.5 * size / 1024**3)
    assert greedy(server, "a", "b")
    answer = post(server, COMPLETIONS, prompt=IDS, cartridges=local("a", "b", "c") * 5)
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-7])
def test_a_temperature_that_overflows_is_no_fault_of_the_cartridge(
    refusing_server: BackgroundServer, temperature: float
) -> None:
    answer = post(refusing_server, COMPLETIONS, prompt=IDS, max_tokens=2, temperature=temperature)
    assert answer.status_code == 400 and "temperature" in answer.json()["detail"]
    cold = post(refusing_server, COMPLETIONS, prompt=IDS, max_tokens=2, temperature=1e-5)
    assert tokens(cold)[0] and math.isfinite(1e-5)


# --- the template -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize(
    "overrides",
    [
        {"chat_template": "{% for i in range(10**9) %}{% endfor %}"},
        {"tokenize": True},
        {"tools": [{}]},
        {"documents": []},
        {"enable_thinking": "{{ loop }}"},
        {"reasoning_effort": "x" * 10_000},
        {"reasoning_effort": {"chat_template": "x"}},
        {"anything": True},
        ["chat_template"],
    ],
)
def test_only_named_switches_reach_the_template(
    refusing_server: BackgroundServer, path: str, overrides: Any
) -> None:
    body = {"messages": USER, "max_tokens": 2, "apply_chat_template_overrides": overrides}
    answer = post(refusing_server, path, **body)
    assert answer.status_code == 422, answer.text
    assert "apply_chat_template_overrides" in answer.json()["detail"]


def test_a_switch_reaches_the_template(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    monkeypatch.setattr(
        server.service.tokenizer,
        "chat_template",
        "{% if enable_thinking %}A{% else %}BC{% endif %}{{ reasoning_effort }}",
    )

    def prompt_tokens(**switches: Any) -> int:
        body = {"messages": USER, "max_tokens": 1, "apply_chat_template_overrides": switches}
        answer = post(server, "/v1/chat/completions", **body)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens"])

    assert prompt_tokens(enable_thinking=True) == 1
    assert prompt_tokens(enable_thinking=False) == 2
    assert prompt_tokens(enable_thinking=True, reasoning_effort="low") == 4


# --- what comes back ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "secret" * 1000, "surprise": "secret" * 100_000},
        {"prompt": IDS, "stop": ["secret" * 10_000] * 3},
        {"prompt": [{"secret": 1}] * 10_000},
        {"prompt": IDS, "logit_bias": {"secret": 1.0}},
        {"prompt": IDS, "metadata": [["secret"] * 1000]},
    ],
)
def test_a_refusal_repeats_nothing(refusing_server: BackgroundServer, body: dict[str, Any]) -> None:
    answer = post(refusing_server, COMPLETIONS, **body)
    assert answer.status_code in (400, 422)
    assert "secret" not in answer.text and len(answer.text) < 600


def test_a_connection_outlives_a_refusal(refusing_server: BackgroundServer) -> None:
    """Not one of these answers closes a connection without saying so."""
    host, port = refusing_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        for body in (raw(n="NaN"), raw(user='"\\ud800"'), raw(n="0"), raw(surprise="1"), raw()):
            head = (
                f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\n"
                "Content-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            connection.sendall(head.encode() + body)
            came = b""
            while b"\r\n\r\n" not in came:
                came += connection.recv(2**16)
            head_came, _, rest = came.partition(b"\r\n\r\n")
            size = int(head_came.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            while len(rest) < size:
                rest += connection.recv(2**16)
            json.loads(rest)
            assert b"connection: close" not in head_came.lower()
    assert came.startswith(b"HTTP/1.1 200")


async def test_the_chat_api_refuses_in_its_own_form(start_server: StartServer) -> None:
    app = create_openai_app(start_server(model_name="m").service, {})
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        for body in (
            b'{"model": "m", "messages": [], "n": NaN}',
            b'{"model": "m", "model": "m", "messages": []}',
            b'{"model": "m", "messages": [], "n": 10000000}',
            b'{"model": "\\ud800", "messages": []}',
            b'{"model": "m", "messages": [], "stop": ["' + b"x" * 10**6 + b'"]}',
        ):
            answer = await http.post("/v1/chat/completions", content=body, headers=JSON)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["type"] == "invalid_request_error"
            assert len(answer.text) < 800
        large = b" " * (MAX_JSON_BYTES + 1)
        answer = await http.post("/v1/chat/completions", content=large, headers=JSON)
        assert answer.status_code == 413 and "limit" in answer.json()["error"]["message"]


async def test_forty_of_the_worst_at_once_and_a_rollout(refusing_server: BackgroundServer) -> None:
    worst = [
        post_body
        for post_body in (raw(n="10000000"), raw(prompt='["x"]'), raw(metadata="[" * 9999))
    ]
    async with httpx.AsyncClient(timeout=60) as http:
        calls = [
            http.post(refusing_server.url + COMPLETIONS, content=worst[n % 3], headers=JSON)
            for n in range(40)
        ]
        *refused, good = await asyncio.gather(
            *calls,
            http.post(refusing_server.url + COMPLETIONS, content=raw(), headers=JSON),
        )
    assert {answer.status_code for answer in refused} <= {400, 422}
    assert good.status_code == 200
