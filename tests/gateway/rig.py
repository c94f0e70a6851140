"""A gateway as a user starts it: a process with a token, over the embedded server or vLLM.

For tests, and for scripts that put load on it, kill it or time it. Knows nothing of what is asked
of it.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families

from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.gateway.settings import TOKEN_VARIABLE
from cartridge_distill.rollout.protocol import CartridgeRef
from cartridge_distill.sync.upload import encode
from cartridge_distill.util.processes import Awaited, Supervisor
from tests.tiny import random_cartridge, tiny_model

ROOT = Path(__file__).resolve().parents[2]
TOKEN = secrets.token_urlsafe(32)
MODEL_NAME = "tiny"
MODEL = tiny_model()
COMPLETIONS = "/custom/cartridge/completions"
_START_SECONDS = 240.0
_VLLM_START_SECONDS = 900.0


def until(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """Polls until ``condition()`` is true, and returns what it gave."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.02)


def upload_bytes(seed: int = 0, tokens: int = 16, step: int = 0, **changes: Any) -> bytes:
    """A well-formed upload of a random cartridge for the tiny model.

    Args:
        changes: ``dtype`` and ``base_model``.
    """
    cartridge = random_cartridge(MODEL, tokens, seed)
    dtype = changes.pop("dtype", torch.float32)
    snapshot = Snapshot.take(cartridge.state_dict(), dtype)
    upload = encode(snapshot, changes.pop("base_model", MODEL_NAME), step)
    return b"".join(bytes(chunk) for chunk in upload.chunks())


def completion(version: str | None = None, max_tokens: int = 4, **more: Any) -> dict[str, Any]:
    """A completion request's body."""
    refs = [CartridgeRef(id=version, source="local").model_dump()] if version else []
    return {
        "model": "default",
        "prompt": [10, 20, 30],
        "max_tokens": max_tokens,
        "temperature": 0.7,
        "logprobs_in_fingerprint": True,
        "cartridges": refs,
        **more,
    }


def child_environment() -> dict[str, str]:
    """For processes of this project: they find the code, and ask no hub for anything."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}


def use_token() -> None:
    """The clients of this process, and of its children, have the token from now on.

    For scripts. A test sets it for its own time, or has clients without it.
    """
    os.environ[TOKEN_VARIABLE] = TOKEN


class Rig:
    """One gateway, which may be killed and started again; a context manager.

    Port and cartridges are the same for each start.

    Args:
        folder: the cartridges and the log go here.
        model: the folder of the served model.
        options: further ones of the gateway.
        server: further ones of the server.
        engine_python: the Python of an environment with vLLM, which is then the server.
        supervisor: ends it; without one, :meth:`stop` does.

    Attributes:
        url: of the gateway.
        http: a client with the token.
        cartridges: the gateway's cartridge directory.
        log_file: of the newest start; those of the starts before it have a number in their names.
        process: the gateway's own process.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        *options: object,
        server: tuple[object, ...] = (),
        engine_python: str | None = None,
        supervisor: Supervisor | None = None,
    ):
        self.cartridges = folder / "cartridges"
        self.log_file = folder / "gateway.log"
        self._supervisor = supervisor or Supervisor()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._command = [
            *(sys.executable, "-m", "cartridge_distill.gateway"),
            *("--model", model, "--model-name", MODEL_NAME, "--port", self._port),
            *("--cartridge-dir", self.cartridges, *options),
            *(("--backend", "vllm", "--engine-python", engine_python) if engine_python else ()),
            *("--", *(() if engine_python else ("--threads", 1)), *server),
        ]
        self._start_seconds = _VLLM_START_SECONDS if engine_python else _START_SECONDS
        self._server_module = "vllm.entrypoints" if engine_python else "cartridge_distill.server"
        self.http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60
        )

    def __enter__(self) -> Rig:
        try:
            return self.start()
        except BaseException:
            self.stop()  # a process that came up too late would outlive the tests
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, wait: bool = True) -> Rig:
        """Once, or again after it was killed.

        Raises:
            ChildFailed: it did not come up; the message has the end of its log.
        """
        folder = self.log_file.parent
        folder.mkdir(parents=True, exist_ok=True)
        if self.log_file.exists():
            number = len(list(folder.glob("gateway*.log")))
            self.log_file.rename(folder / f"gateway.{number:03d}.log")
        environment = {**child_environment(), TOKEN_VARIABLE: TOKEN, "OMP_NUM_THREADS": "1"}
        command = [str(part) for part in self._command]
        self.process = self._supervisor.start(command, self.log_file, environment)
        if wait:
            self.wait_up()
        return self

    def stop(self) -> None:
        """Ends whatever its supervisor has started."""
        self.http.close()
        self._supervisor.stop()

    def wait_up(self) -> None:
        """Until the server behind it answers.

        Raises:
            ChildFailed: the gateway ended, or it takes too long.
        """
        up = Awaited(self.is_up, self.process, self.log_file, "the gateway", self._start_seconds)
        up.wait()

    def is_up(self) -> bool:
        """Does the server behind the gateway answer?"""
        try:
            # Its own client: httpx.get() makes a TLS context, 60 ms of computing, at every look.
            return self.http.get("/ping", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def alive(self) -> bool:
        """Is the gateway's own process there?"""
        return self.process.poll() is None

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def server_process(self) -> psutil.Process | None:
        """The server that the gateway has started; None between two of them."""
        for child in psutil.Process(self.process.pid).children():
            try:
                if any(word.startswith(self._server_module) for word in child.cmdline()):
                    return child
            except psutil.NoSuchProcess:
                pass  # it ended between two looks
        return None

    @property
    def server(self) -> psutil.Process:
        """The server process.

        Raises:
            RuntimeError: it is not there now.
        """
        found = self.server_process()
        if found is None:
            raise RuntimeError("the gateway has no server process now")
        return found

    def server_url(self) -> str:
        """Where the server itself listens, to ask it without the gateway."""
        command = self.server.cmdline()
        return f"http://127.0.0.1:{command[command.index('--port') + 1]}"

    def put(self, version: str, body: bytes, **headers: str) -> httpx.Response:
        return self.http.put(f"/cartridges/{version}", content=body, headers=headers)

    def complete(self, version: str | None = None, **more: Any) -> httpx.Response:
        return self.http.post(COMPLETIONS, json=completion(version, **more))

    def metrics(self) -> dict[tuple[str, ...], float]:
        """``/metrics``, by name (without prefix) and label values in order of the label names."""
        response = self.http.get("/metrics")
        response.raise_for_status()
        return {
            (
                sample.name.removeprefix("cartridge_gateway_"),
                *(sample.labels[name] for name in sorted(sample.labels)),
            ): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }

    def metric(self, name: str, *labels: str) -> float:
        """One value of :meth:`metrics`; 0 for what was not counted yet."""
        return self.metrics().get((name, *labels), 0.0)

    def on_disk(self) -> list[str]:
        """Everything in the cartridge directory but the empty staging folder."""
        staging = self.cartridges / ".staging"
        until(lambda: not any(staging.iterdir()), "what was deleted is gone")
        return sorted(p.name for p in self.cartridges.iterdir() if p.name != ".staging")
