"""Running the app with uvicorn: in the foreground for the command line, in a thread for tests."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from types import TracebackType

import uvicorn
from fastapi import FastAPI
from torch import nn
from transformers import PreTrainedTokenizerBase

from cartridge_distill.server.app import Service, create_app
from cartridge_distill.server.settings import ServerSettings
from cartridge_distill.util.errors import CartridgeDistillError
from cartridge_distill.util.http_connections import uvicorn_options
from cartridge_distill.util.known_hosts import KnownHosts

# A client that holds a request open must not hold up the end of the server.
_GRACE_SECONDS = 3


def uvicorn_server(
    service: Service,
    host: str,
    port: int,
    log_level: str,
    hosts: KnownHosts | None = None,
    create: Callable[[Service, KnownHosts], FastAPI] = create_app,
) -> uvicorn.Server:
    """A configured server, not yet running.

    Args:
        hosts: names that it answers to, by default to ``host``.
        create: makes the routes over the service.
    """
    config = uvicorn.Config(
        create(service, hosts or KnownHosts(host)),
        host=host,
        port=port,
        log_level=log_level,
        access_log=False,  # hundreds of rollouts per step
        timeout_graceful_shutdown=_GRACE_SECONDS,
        **uvicorn_options(service.settings.idle_s, service.settings.max_connections),
    )
    return uvicorn.Server(config)


class BackgroundServer:
    """A server in a thread of this process, on a free port of the loopback; a context manager.

    >>> with BackgroundServer(model, tokenizer, ServerSettings(cartridge_dir=path)) as server:
    ...     httpx.get(server.url + "/ping")

    The model belongs to the server from here on (its attention implementation is replaced).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        settings: ServerSettings,
        threads: int | None = None,
        create: Callable[[Service, KnownHosts], FastAPI] = create_app,
    ) -> None:
        self.service = Service(model, tokenizer, settings, threads)
        self._server = uvicorn_server(self.service, "127.0.0.1", 0, "warning", create=create)
        # With the protocol named, asyncio turns Nagle's algorithm off; uvicorn's two writes per
        # answer would otherwise wait 40 ms for the client's acknowledgement.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._thread: threading.Thread | None = None
        self.url = ""

    def __enter__(self) -> BackgroundServer:
        self._socket.bind(("127.0.0.1", 0))
        # From here on connections queue up until the server takes them: no polling for its start.
        self._socket.listen(2048)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="server", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(30)
            if self._thread.is_alive():
                raise CartridgeDistillError("the embedded server did not stop within 30 s")
        self._socket.close()
