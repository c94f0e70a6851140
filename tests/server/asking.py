"""Requests to the embedded server, as a client writes them."""

from __future__ import annotations

import json
from typing import Any

import httpx

from cartridge_distill.server.running import BackgroundServer

COMPLETIONS = "/custom/cartridge/completions"
CHAT = "/custom/cartridge/chat/completions"
IDS = [10, 20, 30, 40]


def post(server: BackgroundServer, path: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={"model": "m"} | body, timeout=60)


def local(*ids: str) -> list[dict[str, str]]:
    return [{"id": cartridge_id, "source": "local"} for cartridge_id in ids]


def tokens(response: httpx.Response, n: int = 1) -> list[list[int]]:
    assert response.status_code == 200, response.text
    ids: list[list[int]] = json.loads(response.json()["system_fingerprint"])["completion_ids"]
    assert len(ids) == n
    return ids


def greedy(server: BackgroundServer, *ids: str) -> list[int]:
    body: dict[str, Any] = {"prompt": IDS, "max_tokens": 8, "temperature": 0}
    return tokens(post(server, COMPLETIONS, cartridges=local(*ids), **body))[0]
