"""The ASGI app of the gateway: its routes, and what happens at start and stop.

==========================  ======================================================================
``GET /ping``               200 while the server process answers, 503 while it does not; no token
``GET /v1/models``          the base model; ``/{id}``: it, or a version that is here
``POST /v1/chat/...``       OpenAI's chat API, see ``chat``
``POST /v1/completions``    and ``completions``, ``chat/completions`` under
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
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

from cartridge_distill.engines.vllm.launch import PackagePath
from cartridge_distill.gateway.chat import Chat, error_body, is_openai
from cartridge_distill.gateway.commands import server_command, server_environment
from cartridge_distill.gateway.completions import Completions
from cartridge_distill.gateway.guard import Guard
from cartridge_distill.gateway.lock import DirectoryLock
from cartridge_distill.gateway.metrics import Metrics
from cartridge_distill.gateway.model_shape import ModelShape
from cartridge_distill.gateway.pages import PageBudget
from cartridge_distill.gateway.process import ServerDown, ServerProcess
from cartridge_distill.gateway.settings import GatewaySettings
from cartridge_distill.gateway.store import VersionStore
from cartridge_distill.gateway.uploads import Busy, Uploads
from cartridge_distill.gateway.version_info import Conflict, NoRoom, Unknown, VersionInfo
from cartridge_distill.rollout.protocol import (
    CartridgeChatCompletionRequest,
    CartridgeCompletionRequest,
    CompletionRequest,
)
from cartridge_distill.server.openai.answers import (
    CHAT_RESPONSES,
    ERRORS,
    ModelCard,
    ModelCards,
)
from cartridge_distill.server.openai.errors import ApiError, from_validation
from cartridge_distill.server.openai.requests import ChatRequest
from cartridge_distill.sync.upload import FORMATS
from cartridge_distill.util.disconnect import CLIENT_WENT_AWAY
from cartridge_distill.util.disk import DiskFailed, DiskFull
from cartridge_distill.util.errors import CartridgeFormatError, ConfigError, with_fix
from cartridge_distill.util.http_errors import add_refusals, first_problem, protect
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
    """The versions that are here, the oldest first, and in which formats others are taken."""

    cartridges: list[VersionInfo]
    formats: tuple[str, ...] = FORMATS


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in (400, 401, 408, 413, *statuses)}


class Gateway:
    """Everything behind the routes.

    Args:
        settings: see :class:`GatewaySettings`.
        fatal: called when the server process cannot be started; by default the gateway ends
            itself, as SIGTERM would end it.

    Raises:
        ConfigError: the model has no readable configuration, or the cartridge directory cannot be
            written to, or another gateway has it.
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
        self._package = PackagePath() if settings.backend == "vllm" else None
        self.process = ServerProcess(
            lambda port: server_command(settings, port),
            server_environment(self._package),
            settings,
            self.metrics,
            fatal,
            # It will read the versions anew.
            partial(self.store.check, only_changed=True),
        )
        budget = settings.pages_before_restart if settings.defence == "restart" else None
        self.pages = PageBudget(self.process, budget)
        self.completions = Completions(settings, self.store, self.process, self.pages, self.metrics)
        self.chat = Chat(settings, self.store, self.completions)
        self.uploads = Uploads(
            settings, self.shape, self.store, self.process, self.pages, self.metrics
        )
        self.lock = DirectoryLock(settings.cartridge_dir)
        try:
            self.store.open()
        except (DiskFailed, DiskFull) as error:
            self.lock.release()
            raise ConfigError(
                with_fix(f"cartridge_dir: {error}", "name a folder that can be written to")
            ) from error

    def close(self) -> None:
        """Lets go of what outlives a process, when the server has ended."""
        self.lock.release()
        if self._package is not None:
            self._package.remove()

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
        ConfigError: the model has no readable configuration, or the cartridge directory cannot be
            written to, or another gateway has it.
    """
    gateway = Gateway(settings, fatal)
    store, process = gateway.store, gateway.process

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await process.start()  # and no waiting: /ping tells how far it is
        # Meanwhile: nobody is served before it is known what lies there.
        await store.check()
        yield
        await process.stop()
        gateway.close()

    app = FastAPI(title="Cartridge gateway", version="1", lifespan=lifespan)
    app.state.gateway = gateway
    protect(app, settings.idle_s, gateway.body_limit, error_body)
    app.add_middleware(Guard, token=token, metrics=gateway.metrics)
    # The last one is outermost.
    if hosts is not None or token is None:
        app.add_middleware(OnlyKnownHosts, hosts=hosts or KnownHosts())
    add_refusals(app, error_body=error_body)
    _add_errors(app)

    @app.get("/ping", responses={503: {"model": Problem}})
    async def ping() -> dict[str, str]:
        if not process.is_up:
            raise ServerDown("the server process is being started")
        return {"message": "pong"}

    @app.get("/metrics", responses={401: {"model": Problem}}, response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> ModelCards:
        await process.wait_up(settings.hold_s)
        # Named as uploads name it, not by the folder it was loaded from. Versions come and go by
        # the minute, and are no part of what a run writes down about its server.
        return ModelCards(data=[gateway.chat.card(settings.base_model)])

    @app.get("/v1/models/{model:path}", responses=ERRORS)  # names of models hold slashes
    async def one_model(model: str) -> ModelCard:
        return gateway.chat.card(model)

    passed: dict[str, Any] = {"responses": _problems(404, 422, 429, 503, 507)}

    @app.post("/v1/completions", **passed)
    async def completions(request: CompletionRequest, http: Request) -> Response:
        return await gateway.completions.answer(request, http)

    @app.post("/v1/chat/completions", responses=CHAT_RESPONSES, response_class=JSONResponse)
    async def chat_completions(request: ChatRequest, http: Request) -> Response:
        return await gateway.chat.answer(request, http)

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

    @app.get("/cartridges/{version_id}", responses=_problems(404, 422, 507))
    async def get_cartridge(version_id: VersionId) -> VersionInfo:
        return store.info(version_id)

    @app.delete("/cartridges/{version_id}", responses=_problems(404, 409, 422, 507))
    async def delete_cartridge(version_id: VersionId) -> VersionInfo:
        return store.delete(version_id)

    return app


def _add_errors(app: FastAPI) -> None:
    """What goes wrong behind the routes, as HTTP."""

    def add(kind: type[Exception], status: int, headers: dict[str, str] | None = None) -> None:
        async def answer(http: Request, error: Exception) -> JSONResponse:
            return JSONResponse(error_body(http.scope["path"], status, str(error)), status, headers)

        app.add_exception_handler(kind, answer)

    add(Unknown, 404)
    add(Conflict, 409)
    add(CartridgeFormatError, 422)
    add(Busy, 429, {"Retry-After": "1"})
    add(ServerDown, 503, {"Retry-After": "1"})
    add(NoRoom, 507)
    add(DiskFull, 507)
    add(DiskFailed, 507)
    add(ClientDisconnect, CLIENT_WENT_AWAY)  # in the middle of its own body

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def malformed(http: Request, error: RequestValidationError) -> Response:
        if is_openai(http.scope["path"]):
            return from_validation(error).response()
        return JSONResponse({"detail": first_problem(error)}, 422)
