"""The front in a server: its routes come first, what stands around the server stays around them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from cartridge_distill.engines.vllm import front
from cartridge_distill.engines.vllm.front import CartridgeFront, _Ours
from cartridge_distill.util.errors import ConfigError


def server() -> FastAPI:
    """A server as vLLM builds its own: a key asked for outside of the routes, then the front."""
    app = FastAPI()

    @app.middleware("http")
    async def key(request: Request, go_on: Any) -> Any:
        if request.headers.get("authorization") != "Bearer key":
            return JSONResponse({"error": "key"}, 401)
        return await go_on(request)

    @app.get("/v1/models")
    async def models() -> str:
        return "theirs"

    @app.get("/health")
    async def health() -> str:
        return "theirs"

    app.add_middleware(CartridgeFront)
    return app


def ours() -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> str:
        return "ours"

    return app


async def ask(app: FastAPI, method: str, path: str, key: str | None = "key") -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    way = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=way, base_url="http://localhost") as http:
        return await http.request(method, path, headers=headers)


async def test_our_routes_come_first_and_theirs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_install", lambda app: app.router.routes.insert(0, _Ours(ours())))
    app = server()
    assert (await ask(app, "GET", "/v1/models")).json() == "ours"
    assert (await ask(app, "GET", "/health")).json() == "theirs"
    # A path of ours is ours with every method: theirs must not answer for it.
    assert (await ask(app, "POST", "/v1/models")).status_code == 405
    assert (await ask(app, "GET", "/v1/models", key=None)).status_code == 401
    assert len([route for route in app.router.routes if isinstance(route, _Ours)]) == 1


async def test_a_server_that_cannot_serve_cartridges_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(app: FastAPI) -> None:
        raise ConfigError("no connector")

    monkeypatch.setattr(front, "_install", refuse)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        sent.append(message)

    await server()({"type": "lifespan"}, receive, send)
    assert sent == [{"type": "lifespan.startup.failed", "message": "no connector"}]
    with pytest.raises(ConfigError):  # and a request that comes nevertheless is not answered
        await ask(server(), "GET", "/v1/models")


def test_a_server_without_a_connector_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "installed", lambda: None)
    app = FastAPI()
    with pytest.raises(ConfigError, match="engine_client"):
        front._install(app)

    class Config:
        kv_transfer_config = None

    app.state.vllm_config, app.state.engine_client = Config(), object()
    with pytest.raises(ConfigError, match="no connector"):
        front._install(app)
