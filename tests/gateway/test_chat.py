"""OpenAI's chat API of the gateway: the client is OpenAI's own, the answers are its types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.gateway.rig import MODEL_NAME, TOKEN, Rig, upload_bytes
from tests.server.openai import strict

pytestmark = pytest.mark.integration

USER = {"role": "user", "content": "What is it?"}
ASK: dict[str, Any] = {
    "model": MODEL_NAME,
    "messages": [USER],
    "max_completion_tokens": 12,
    "temperature": 0,
}
VERSION = "chat-01-final"


@pytest.fixture(scope="module")
def client(rig: Rig) -> Iterator[openai.OpenAI]:
    assert rig.put(VERSION, upload_bytes(3)).is_success
    with openai.OpenAI(base_url=f"{rig.url}/v1", api_key=TOKEN, max_retries=0) as made:
        yield made
    rig.http.delete(f"/cartridges/{VERSION}")


def post(rig: Rig, **body: Any) -> httpx.Response:
    return rig.http.post("/v1/chat/completions", json=ASK | body)


def wire(rig: Rig, **body: Any) -> str:
    """The answer by the Tokasaurus protocol."""
    asked = {"model": "default", "messages": [USER], "max_tokens": 12, "temperature": 0, **body}
    answer = rig.http.post("/custom/cartridge/chat/completions", json=asked)
    return str(answer.json()["choices"][0]["message"]["content"])


def test_a_version_is_a_model(rig: Rig, client: openai.OpenAI) -> None:
    refs = [{"id": VERSION, "source": "local"}]
    answers = {}
    for name, more in ((MODEL_NAME, {}), (VERSION, {"cartridges": refs})):
        answer = strict.completion(post(rig, model=name))
        assert answer.model == name
        assert answer.choices[0].message.content == wire(rig, **more)
        assert strict.model(rig.http.get(f"/v1/models/{name}").json()).id == name
        assert client.models.retrieve(name).id == name
        answers[name] = answer.choices[0].message.content
    assert len(set(answers.values())) == 2
    listed = rig.http.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [strict.model(card).id for card in listed["data"]] == [MODEL_NAME]


def test_a_stream_is_the_whole_answer(rig: Rig, client: openai.OpenAI) -> None:
    whole = strict.completion(post(rig, model=VERSION, n=2))
    usage = {"include_usage": True}
    chunks = strict.chunks(post(rig, model=VERSION, n=2, stream=True, stream_options=usage))
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert mine[-1].finish_reason == choice.finish_reason
    assert chunks[-1].usage == whole.usage
    parsed = list(client.chat.completions.create(**ASK | {"model": VERSION}, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in parsed) == (
        whole.choices[0].message.content
    )


def test_the_prompt_counts_once(rig: Rig, client: openai.OpenAI) -> None:
    one, three = (strict.completion(post(rig, n=n)).usage for n in (1, 3))
    assert one is not None and three is not None
    assert three.prompt_tokens == one.prompt_tokens == len("<user>What is it?\n<assistant>")
    assert three.total_tokens == three.prompt_tokens + three.completion_tokens
    details = three.prompt_tokens_details
    assert details is not None and details.cached_tokens is not None
    assert details.cached_tokens < three.prompt_tokens


@pytest.mark.parametrize(
    "changes",
    [
        {"stop": ""},
        {"stop": ["", "never this"]},
        {"tools": [], "store": True, "user": "u", "metadata": {"a": "b"}},
        {"response_format": {"type": "text"}, "top_p": 1},
        {"messages": [USER, {"role": "assistant", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": USER["content"]}]}]},
        {"max_completion_tokens": None, "max_tokens": 12},
    ],
)
def test_what_asks_for_nothing_changes_nothing(rig: Rig, changes: dict[str, Any]) -> None:
    assert strict.completion(post(rig, **changes)).choices == strict.completion(post(rig)).choices


@pytest.mark.parametrize(
    ("changes", "status", "param", "code"),
    [
        ({"model": "carl"}, 404, "model", "model_not_found"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_value"),
        ({"logprobs": True}, 400, "logprobs", "unsupported_value"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_value"),
        ({"n": "2"}, 400, "n", "invalid_type"),
        ({"surprise": 1}, 400, "surprise", "unknown_parameter"),
        ({"n": 5}, 400, None, None),  # the gateway's own bounds
        ({"max_completion_tokens": 401}, 400, None, None),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, None, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refused_in_openais_form(
    rig: Rig,
    changes: dict[str, Any],
    status: int,
    param: str | None,
    code: str | None,
    stream: bool,
) -> None:
    answer = post(rig, stream=stream, **changes)
    assert answer.status_code == status, answer.text
    error = strict.problem(answer)
    assert (error["param"], error["code"]) == (param, code)


def test_errors_before_the_routes_have_that_form_too(rig: Rig) -> None:
    stranger = httpx.post(f"{rig.url}/v1/chat/completions", json=ASK)
    assert stranger.status_code == 401
    assert "bearer token" in strict.problem(stranger)["message"]
    large = post(rig, messages=[{"role": "user", "content": "x" * 30_000}])
    assert large.status_code == 413
    assert "20000" in strict.problem(large)["message"]
    assert rig.http.delete("/v1/models/tiny").status_code == 405
    strict.problem(rig.http.delete("/v1/models/tiny"))
    strict.problem(rig.http.get("/v1/models/nobody"))
    # The Tokasaurus protocol keeps its own.
    assert "detail" in rig.http.post("/v1/completions", json={}).json()


def test_the_client_knows_the_errors(client: openai.OpenAI, rig: Rig) -> None:
    with pytest.raises(openai.NotFoundError, match="'carl' is not here; here are: tiny, .*chat-01"):
        client.chat.completions.create(**ASK | {"model": "carl"})
    with pytest.raises(openai.BadRequestError, match="json_schema|response_format"):
        client.chat.completions.create(**ASK, response_format={"type": "json_object"})
    wrong = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        wrong.chat.completions.create(**ASK)
    assert "Traceback" not in rig.log
