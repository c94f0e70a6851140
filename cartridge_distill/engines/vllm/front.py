"""Puts this project's routes into vLLM's own HTTP server: ``--middleware`` names the class.

vLLM makes the middleware with its server. When the server begins, the class adds routes that are
found before vLLM's, and passes everything on: what stands around vLLM's routes (its API key, its
metrics) stands around these, too. vLLM's other routes stay. What names a cartridge there has not
come through here, and the connector fails it.

With a directory of cartridges the routes are those of the Tokasaurus protocol, for training; with
named cartridges they are OpenAI's chat API, each cartridge a model of its own.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from cartridge_distill.engines.vllm.answers import VllmAnswers
from cartridge_distill.engines.vllm.options import Options
from cartridge_distill.engines.vllm.versions import installed
from cartridge_distill.server.app import create_app
from cartridge_distill.server.openai.app import create_openai_app
from cartridge_distill.util.errors import CartridgeDistillError, ConfigError
from cartridge_distill.util.known_hosts import KnownHosts

# vLLM shows what its own loggers say, and these are below them.
logger = logging.getLogger("vllm.cartridges")


class CartridgeFront:
    """An ASGI layer that changes nothing but the routes of the application around it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._installed = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._installed:
            try:
                _install(scope["app"])
            except CartridgeDistillError as error:
                logger.error("cannot serve cartridges: %s", error)
                if scope["type"] != "lifespan":
                    raise
                # Said in the protocol's words: the server then ends, and does not go on without.
                await receive()
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
            self._installed = True
        await self._app(scope, receive, send)


class _Ours(BaseRoute):
    """All paths of one of this project's applications."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] == "http":
            for route in self._app.router.routes:
                if route.matches(scope)[0] != Match.NONE:
                    return Match.FULL, {}
        return Match.NONE, {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A copy: an application writes itself into its scope.
        await self._app(dict(scope), receive, send)


def _install(server: Any) -> None:
    """Adds the routes to vLLM's application.

    Raises:
        ConfigError: this vLLM, or a setting of it, is not known to give right answers.
    """
    installed()
    state = server.state
    config = getattr(state, "vllm_config", None)
    engine = getattr(state, "engine_client", None)
    if config is None or engine is None:
        raise ConfigError(
            "vLLM's HTTP server has no engine where it was expected (app.state.engine_client); "
            "fix: install a vLLM that is known (docs/vllm.md)"
        )
    if config.kv_transfer_config is None:
        raise ConfigError(
            "this server has the front for cartridges and no connector; fix: start it with the "
            "--kv-transfer-config that `cartridge-distill serve --engine vllm` prints"
        )
    options = Options.read(config.kv_transfer_config.kv_connector_extra_config)
    answers = VllmAnswers(engine, config, options)
    hosts = KnownHosts(state.args.host or "0.0.0.0", options.allow_hosts)
    if options.cartridges is None:
        app = create_app(answers, hosts)
    else:
        app = create_openai_app(answers, {name: name for name in options.cartridges}, hosts)
    # FastAPI's own pages about itself stay vLLM's.
    app.router.routes[:] = [
        route for route in app.router.routes if getattr(route, "include_in_schema", False)
    ]
    server.router.routes.insert(0, _Ours(app))
    logger.info(
        "cartridges are served: %s", options.cartridge_dir or list(options.cartridges or ())
    )
