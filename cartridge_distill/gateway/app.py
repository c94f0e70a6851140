"""The ASGI app of the gateway: its routes, and what happens at start and stop.

==========================  ======================================================================
``GET /ping``               200 while the server process answers, 503 while it does not; no token
``GET /v1/models``          the server's own answer
``POST /v1/...``            ``completions``, ``chat/completions``, also under
                            ``/custom/cartridge/``: passed through
``PUT /cartridges/{id}``    a new version, see ``transfer`` for the format
``GET /cartridges``         the versions that are here; ``/{id}``: one of them
``DELETE /cartridges/{id}`` a version that no request uses
``GET /metrics``            Prometheus
==========================  ======================================================================

Of the server's own paths ``/v1/files`` and ``/v1/batches`` are left out: a batch names cartridges
where nothing here would check them.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import aiohttp
from fastapi import FastAPI, Path, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

from cartridge_distill.gateway.commands import server_command, server_environment
from cartridge_distill.gateway.completions import Completions
from cartridge_distill.gateway.guard import Guard
from cartridge_distill.gateway.lock import DirectoryLock
from cartridge_distill.gateway.metrics import Metrics
from cartridge_distill.gateway.model_shape import ModelShape
from cartridge_distill.gateway.pages import PageBudget
from cartridge_distill.gateway.process import ServerDown, ServerProcess, refuse_redirect
from cartridge_distill.gateway.settings import GatewaySettings
from cartridge_distill.gateway.store import Conflict, NoRoom, Unknown, VersionInfo, VersionStore
from cartridge_distill.gateway.uploads import Busy, Uploads
from cartridge_distill.rollout.protocol import (
    CartridgeChatCompletionRequest,
    CartridgeCompletionRequest,
    ChatCompletionRequest,
    CompletionRequest,
)
from cartridge_distill.util.disk import DiskFull
from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.http_errors import add_refusals, protect, shortened
from cartridge_distill.util.known_hosts import KnownHosts, OnlyKnownHosts

logger = logging.getLogger(__name__)

_SMALL_BODY = 2**16
# Letters, digits, dot, dash, underscore; a first character that makes no hidden or parent folder.
VersionId = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]


class Problem(BaseModel):
    """Every refusal."""

    detail: str


class UploadAnswer(VersionInfo):
    """What became of an upload."""

    is_new: bool = Field(description="false when this very content was there already")


class VersionList(BaseModel):
    """The versions that are here, the oldest first."""

    cartridges: list[VersionInfo]


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in (400, 401, 408, 413, *statuses)}


class Gateway:
    """Everything behind the routes.

    Args:
        settings: see :class:`GatewaySettings`.
        fatal: called when the server process cannot be started; by default the gateway ends
            itself, as SIGTERM would end it.

    Raises:
        ConfigError: the model has no readable configuration, or another gateway has the cartridge
            directory.
    """

    def __init__(self, settings: GatewaySettings, fatal: Callable[[str], None]) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.shape = ModelShape.of(settings.model, settings.base_model)
        self.store = VersionStore(
            settings.cartridge_dir,
            settings.keep_versions,
            int(settings.max_disk_gb * 1e9),
            self.metrics,
        )
        self.process = ServerProcess(
            lambda port: server_command(settings, port),
            server_environment(),
            settings,
            self.metrics,
            fatal,
        )
        budget = settings.pages_before_restart if settings.defence == "restart" else None
        self.pages = PageBudget(self.process, budget)
        self.completions = Completions(settings, self.store, self.process, self.pages, self.metrics)
        self.uploads = Uploads(
            settings, self.shape, self.store, self.process, self.pages, self.metrics
        )
        self.lock = DirectoryLock(settings.cartridge_dir)  # last: nothing fails after it

    def body_limit(self, method: str, path: str) -> int:
        """Bytes that a request may bring."""
        if method == "PUT":
            return self.shape.max_upload_bytes(self.settings.max_cartridge_tokens)
        return self.settings.max_request_bytes if method == "POST" else _SMALL_BODY


def end_this_process(reason: str) -> None:
    """The default for a server process that cannot be started."""
    logger.critical("%s", reason)
    os.kill(os.getpid(), signal.SIGTERM)


def create_app(
    settings: GatewaySettings,
    token: str | None,
    fatal: Callable[[str], None] = end_this_process,
    hosts: KnownHosts | None = None,
) -> FastAPI:
    """The app; the server process starts and stops with it.

    Args:
        token: clients must send it, see :func:`~.settings.token_from_environment`; None for a
            gateway that only the loopback reaches.
        hosts: names of the gateway; other requests are refused. By default the loopback's without
            a token, and every name with one: a page that makes a browser ask has no token.

    Raises:
        ConfigError: the model has no readable configuration, or another gateway has the cartridge
            directory.
    """
    gateway = Gateway(settings, fatal)
    store, process = gateway.store, gateway.process

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        store.open()
        await process.start()  # and no waiting: /ping tells how far it is
        yield
        await process.stop()
        gateway.lock.release()

    app = FastAPI(title="Cartridge gateway", version="1", lifespan=lifespan)
    app.state.gateway = gateway
    protect(app, settings.idle_s, gateway.body_limit)
    app.add_middleware(Guard, token=token, metrics=gateway.metrics)
    # The last one is outermost.
    if hosts is not None or token is None:
        app.add_middleware(OnlyKnownHosts, hosts=hosts or KnownHosts())
    add_refusals(app)
    _add_errors(app)

    @app.get("/ping", responses={503: {"model": Problem}})
    async def ping() -> dict[str, str]:
        if not process.is_up:
            raise ServerDown("the server process is being started")
        return {"message": "pong"}

    @app.get("/metrics", responses={401: {"model": Problem}}, response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses=_problems(503))
    async def models() -> dict[str, Any]:
        answer = await _get(gateway, "/v1/models")
        for card in answer.get("data", []):
            card["id"] = settings.base_model  # not the folder it was loaded from
        return answer

    passed: dict[str, Any] = {"responses": _problems(404, 422, 429, 503)}

    @app.post("/v1/completions", **passed)
    async def completions(request: CompletionRequest, http: Request) -> Response:
        return await gateway.completions.answer(request, http)

    @app.post("/v1/chat/completions", **passed)
    async def chat_completions(request: ChatCompletionRequest, http: Request) -> Response:
        return await gateway.completions.answer(request, http)

    @app.post("/custom/cartridge/completions", **passed)
    async def cartridge_completions(request: CartridgeCompletionRequest, http: Request) -> Response:
        return await gateway.completions.answer(request, http)

    @app.post("/custom/cartridge/chat/completions", **passed)
    async def cartridge_chat_completions(
        request: CartridgeChatCompletionRequest, http: Request
    ) -> Response:
        return await gateway.completions.answer(request, http)

    upload_body = {"content": {"application/octet-stream": {"schema": {"format": "binary"}}}}

    @app.put(
        "/cartridges/{version_id}",
        response_model=UploadAnswer,
        responses={201: {"model": UploadAnswer}, **_problems(409, 422, 429, 503, 507)},
        openapi_extra={"requestBody": upload_body | {"required": True}},
    )
    async def put_cartridge(version_id: VersionId, http: Request) -> JSONResponse:
        done = await gateway.uploads.take(version_id, http.stream())
        answer = UploadAnswer(**dict(done.info), is_new=done.is_new)
        return JSONResponse(answer.model_dump(), 201 if done.is_new else 200)

    @app.get("/cartridges", responses=_problems())
    async def list_cartridges() -> VersionList:
        return VersionList(cartridges=store.infos)

    @app.get("/cartridges/{version_id}", responses=_problems(404, 422))
    async def get_cartridge(version_id: VersionId) -> VersionInfo:
        return store.info(version_id)

    @app.delete("/cartridges/{version_id}", responses=_problems(404, 409, 422))
    async def delete_cartridge(version_id: VersionId) -> VersionInfo:
        return store.delete(version_id)

    return app


async def _get(gateway: Gateway, path: str) -> dict[str, Any]:
    await gateway.process.wait_up(gateway.settings.hold_s)
    try:
        async with gateway.process.session.get(
            gateway.process.url + path, allow_redirects=False
        ) as response:
            refuse_redirect(response)
            answer: dict[str, Any] = await response.json()
            return answer
    except aiohttp.ClientError as error:
        raise ServerDown(f"the server process broke off ({type(error).__name__})") from error


def _add_errors(app: FastAPI) -> None:
    """What goes wrong behind the routes, as HTTP."""

    def add(kind: type[Exception], status: int, headers: dict[str, str] | None = None) -> None:
        async def answer(_: Request, error: Exception) -> JSONResponse:
            return JSONResponse({"detail": shortened(str(error))}, status, headers)

        app.add_exception_handler(kind, answer)

    add(Unknown, 404)
    add(Conflict, 409)
    add(CartridgeFormatError, 422)
    add(Busy, 429, {"Retry-After": "1"})
    add(ServerDown, 503, {"Retry-After": "1"})
    add(NoRoom, 507)
    add(DiskFull, 507)
    add(ClientDisconnect, 499)  # in the middle of its own body; nobody reads the answer
