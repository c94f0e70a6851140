"""Gateways of their own, for the tests that end them or need other settings."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from cartridge_distill.gateway import app as gateway_app
from cartridge_distill.gateway.settings import GatewaySettings
from tests.gateway import failing_server
from tests.gateway.rig import MODEL_NAME, Rig, until

StartRig = Callable[..., Rig]


@pytest.fixture
def start_rig(model_folder: Path, tmp_path: Path) -> Iterator[StartRig]:
    """A function that makes a gateway of its own; it is stopped at the end."""
    made: list[Rig] = []

    def start(*options: object, wait: bool = True, server: tuple[str, ...] = ()) -> Rig:
        made.append(Rig(tmp_path / f"rig{len(made)}", model_folder, *options, server=server))
        return made[-1].start(wait)

    yield start
    for one in made:
        one.__exit__(None, None, None)


@pytest.fixture
def failing_gateway(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[httpx.Client, Path]]:
    """A gateway in this process, over a server that fails while a file exists.

    Its forwards fail while ``flag`` does, the reading of cartridges while ``flag.reads`` does.
    """
    flag = tmp_path / "fail"
    monkeypatch.setenv(failing_server.FAIL_WHILE, str(flag))
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    command = gateway_app.server_command

    def failing_command(settings: GatewaySettings, port: int) -> list[str]:
        _, _, _, *arguments = command(settings, port)
        return [sys.executable, "-m", failing_server.__name__, *arguments]

    monkeypatch.setattr(gateway_app, "server_command", failing_command)
    settings = GatewaySettings(
        model=str(model_folder),
        model_name=MODEL_NAME,
        cartridge_dir=tmp_path / "cartridges",
        server_args=("--threads", "1"),
    )
    listener = socket.create_server(("127.0.0.1", 0))
    app = gateway_app.create_app(settings, None)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=60) as http:
            until(lambda: http.get("/ping").status_code == 200, "the gateway answers", 240)
            yield http, flag
    finally:
        server.should_exit = True
        thread.join(60)
