"""What the deployed function serves: the gateway, its token, and versions that outlive it."""

from __future__ import annotations

import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Response

import cartridge_distill.gateway.app as gateway_app
from cartridge_distill.gateway.settings import GatewaySettings
from cartridge_distill.util.errors import ConfigError
from tests.deploy.recording import load

TOKEN = "a token that is long enough"


@pytest.fixture(scope="module")
def module() -> ModuleType:
    """The file with default settings."""
    return load("modal_tokasaurus")[0]


@pytest.fixture
def served(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path
) -> Callable[[], tuple[FastAPI, dict[str, Any], ModuleType]]:
    """Calls the deployed function here: its app, and what the gateway was made with."""

    def call() -> tuple[FastAPI, dict[str, Any], ModuleType]:
        module, _ = load("modal_tokasaurus")
        monkeypatch.setattr(module, "weights_folder", lambda _: model_folder)
        monkeypatch.setattr(module, "CARTRIDGES", tmp_path)
        made: dict[str, Any] = {}
        real = gateway_app.create_app

        def create(settings: GatewaySettings, token: str | None) -> FastAPI:
            made.update(settings=settings, token=token)
            return real(settings, token)

        monkeypatch.setattr(gateway_app, "create_app", create)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*executing locally.*")  # no Volume here
            return module.serve.local(), made, module

    return call


def test_what_is_served_is_the_gateway(
    served: Callable[[], tuple[FastAPI, dict[str, Any], ModuleType]],
    monkeypatch: pytest.MonkeyPatch,
    model_folder: Path,
) -> None:
    monkeypatch.setenv("TOKASAURUS_API_KEY", TOKEN)
    app, made, module = served()
    assert isinstance(app, FastAPI)
    assert made["token"] == TOKEN
    assert made["settings"].backend == "tokasaurus"
    assert made["settings"].model == str(model_folder)
    assert made["settings"].base_model == module.settings.model
    routes = {
        (method, getattr(route, "path", ""))
        for route in app.routes
        for method in getattr(route, "methods", None) or ()
    }
    assert ("GET", "/ping") in routes
    for method in ("PUT", "GET", "DELETE"):
        assert any(m == method and p.startswith("/cartridges/{") for m, p in routes), method
    assert any(entry.cls is module.CommitUploads for entry in app.user_middleware)


def test_nothing_is_served_without_a_token(
    served: Callable[[], tuple[FastAPI, dict[str, Any], ModuleType]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TOKASAURUS_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="TOKASAURUS_API_KEY is not set"):
        served()


# ---- the Volume is committed before an upload is answered


def answering(
    module: ModuleType, commit: Callable[[], Awaitable[None]], status: int
) -> httpx.AsyncClient:
    app = FastAPI()

    @app.api_route("/cartridges/one", methods=["GET", "PUT"])
    def answer() -> Response:
        return Response("as the gateway said", status_code=status)

    app.add_middleware(module.CommitUploads, commit=commit)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


@pytest.mark.parametrize(
    ("method", "status", "commits"),
    [("PUT", 201, 1), ("PUT", 200, 1), ("PUT", 409, 0), ("PUT", 429, 0), ("GET", 200, 0)],
)
async def test_only_what_was_taken_is_committed(
    module: ModuleType, method: str, status: int, commits: int
) -> None:
    made: list[str] = []

    async def commit() -> None:
        made.append("commit")

    async with answering(module, commit, status) as client:
        response = await client.request(method, "/cartridges/one")
    assert (response.status_code, response.text) == (status, "as the gateway said")
    assert len(made) == commits


async def test_answer_waits_for_the_commit(module: ModuleType) -> None:
    order: list[str] = []

    async def commit() -> None:
        order.append("committed")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        order.append("taken")
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        order.append(message["type"])

    scope = {"type": "http", "method": "PUT", "path": "/cartridges/one"}
    await module.CommitUploads(app, commit)(scope, None, send)
    assert order == ["taken", "committed", "http.response.start", "http.response.body"]


async def test_refused_commit_does_not_lose_the_answer(
    module: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    async def commit() -> None:
        raise RuntimeError("there are open files preventing the operation")

    async with answering(module, commit, 201) as client:
        response = await client.put("/cartridges/one")
    assert response.status_code == 201
    assert "open files" in caplog.text and "/cartridges/one" in caplog.text


async def test_lifespan_passes_through(module: ModuleType) -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    await module.CommitUploads(app, None)({"type": "lifespan"}, None, None)
    assert seen == ["lifespan"]
