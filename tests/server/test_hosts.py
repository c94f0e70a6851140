"""A server without a token answers to its own names alone, over real connections."""

from __future__ import annotations

import copy
from typing import Any

import httpx
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.server.running import BackgroundServer
from cartridge_distill.server.settings import ServerSettings

PATHS = [("GET", "/ping"), ("GET", "/v1/models"), ("POST", "/custom/cartridge/completions")]
HOSTILE: list[list[tuple[str, str]]] = [
    [("Host", "evil.example")],
    [("Host", "127.0.0.1.evil.example:80")],
    [("Origin", "http://evil.example")],
    [("Origin", "null")],
    [("Host", "evil.example"), ("Origin", "http://evil.example")],
]


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize("headers", HOSTILE, ids=str)
def test_other_names_get_403(
    refusing_server: BackgroundServer, method: str, path: str, headers: list[tuple[str, str]]
) -> None:
    body = {"model": "m", "prompt": [1, 2], "max_tokens": 1} if method == "POST" else None
    answer = httpx.request(method, refusing_server.url + path, headers=headers, json=body)
    assert answer.status_code == 403
    assert "--allow-host" in answer.json()["detail"]


def test_preflights_are_refused(refusing_server: BackgroundServer) -> None:
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert httpx.options(refusing_server.url + "/ping", headers=headers).status_code == 403


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "LocalHost:1", "[::1]"])
def test_own_names_and_pages_of_this_machine(refusing_server: BackgroundServer, name: str) -> None:
    headers = {"Host": name, "Origin": "http://localhost:3000"}
    assert httpx.get(refusing_server.url + "/ping", headers=headers).status_code == 200


async def test_the_trainers_client_is_known(refusing_server: BackgroundServer) -> None:
    async with TokasaurusClient(refusing_server.url) as client:
        assert await client.ping()
    async with TokasaurusClient(refusing_server.url.replace("127.0.0.1", "localhost")) as client:
        assert await client.ping()


def test_a_name_that_was_allowed(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Any
) -> None:
    from cartridge_distill.server.running import uvicorn_server
    from cartridge_distill.util.known_hosts import KnownHosts

    server = BackgroundServer(copy.deepcopy(llama), tokenizer, ServerSettings(tmp_path))
    hosts = KnownHosts("127.0.0.1", ["serve.example"])
    server._server = uvicorn_server(server.service, "127.0.0.1", 0, "warning", hosts)
    with server:
        for name, status in (("serve.example", 200), ("other.example", 403)):
            headers = {"Host": name, "Origin": f"https://{name}"}
            assert httpx.get(server.url + "/v1/models", headers=headers).status_code == status
