"""The page, over HTTP: what it may do, what it is told, the model that has read the document."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator

import httpx
import pytest
import torch

from cartridge_distill.model.prompts import render_document, render_prompt
from cartridge_distill.server.running import BackgroundServer
from tests.server.playground_server import BASE, DOCUMENT, playground_server
from tests.tiny import byte_tokenizer, plain_distributions, tiny_model

QUESTION = [{"role": "user", "content": "Who keeps the keys?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackgroundServer]:
    with playground_server(tmp_path_factory.mktemp("playground")) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: BackgroundServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


def ask(http: httpx.Client, model: str, **more: object) -> httpx.Response:
    body = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 8, **more}
    return http.post("/v1/chat/completions", json=body)


def test_the_page_loads_nothing_and_its_policy_allows_what_is_in_it(http: httpx.Client) -> None:
    answer = http.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"https?://|\ssrc=|@import|url\(|innerHTML|\son\w+=", answer.text)


def test_the_page_is_told_what_each_model_takes(http: httpx.Client) -> None:
    about = http.get("/playground").json()
    tokens = len(render_document(byte_tokenizer(), DOCUMENT))
    anna, ben = about["cartridges"]
    assert about["model"] == BASE and anna["cartridge"] == {"model": "anna", "tokens": 16}
    assert anna["document"] == {"model": "anna:document", "tokens": tokens}
    assert ben["document"] is None and "Not known" in ben["no_document"]
    names = [one["id"] for one in http.get("/v1/models").json()["data"]]
    assert names == [BASE, "anna", "ben", "anna:document"]


def test_a_documents_model_answers_as_the_teacher_and_the_document_is_kept(
    http: httpx.Client,
) -> None:
    tokenizer, model = byte_tokenizer(), tiny_model(max_position_embeddings=16_384)
    document, new = render_document(tokenizer, DOCUMENT), list[int]()
    prompt = [*document, *render_prompt(tokenizer, QUESTION)]
    for _ in range(8):
        with torch.no_grad():
            new.append(int(plain_distributions(model, None, prompt, [*new, 0])[-1].argmax()))
    answer = ask(http, "anna:document").json()
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(new)
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(prompt)
    assert usage["prompt_tokens_details"]["cached_tokens"] == len(document)
    told = ask(http, "anna:document", max_tokens=16_384 - len(prompt) + 1)
    assert told.status_code == 400 and told.json()["error"]["code"] == "context_length_exceeded"
    assert "anna:document" in ask(http, "nobody").json()["error"]["message"]


def test_other_pages_may_neither_read_nor_ask(http: httpx.Client) -> None:
    for path in ("/", "/playground", "/health"):
        assert http.get(path, headers={"Host": "evil.example"}).status_code == 403
    foreign = {"Origin": "http://evil.example"}
    body = {"model": "anna", "messages": QUESTION, "max_tokens": 1}
    assert http.post("/v1/chat/completions", json=body, headers=foreign).status_code == 403
    own = {"Origin": str(http.base_url).rstrip("/")}
    assert http.post("/v1/chat/completions", json=body, headers=own).status_code == 200


def test_health_says_whether_answers_are_computed(tmp_path_factory: pytest.TempPathFactory) -> None:
    with playground_server(tmp_path_factory.mktemp("playground")) as server:
        url = f"{server.url}/health"
        assert httpx.get(url, timeout=60).json() == {"status": "ok"}
        server.service.engine.stop()
        answer = httpx.get(url, timeout=60)
        assert answer.status_code == 503 and "start the server again" in answer.text
