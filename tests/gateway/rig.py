"""A gateway as a user starts it: a process with a token, over the tiny model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil
import torch

from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.rollout.protocol import CartridgeRef
from cartridge_distill.sync.upload import encode
from tests.tiny import random_cartridge, tiny_model

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "test-token-0123456789abcdef"
MODEL_NAME = "tiny"
MODEL = tiny_model()


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


COMPLETIONS = "/custom/cartridge/completions"


class Rig:
    """One gateway process; a context manager.

    Attributes:
        url: of the gateway.
        http: a client with the token.
        cartridges: the gateway's cartridge directory.
    """

    def __init__(self, folder: Path, model: Path, *options: object, server: tuple[str, ...] = ()):
        self.cartridges = folder / "cartridges"
        self.log_file = folder / "gateway.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._command = [
            *(sys.executable, "-m", "cartridge_distill.gateway"),
            *("--model", model, "--model-name", MODEL_NAME, "--port", port),
            *("--cartridge-dir", self.cartridges, *options),
            *("--", "--threads", "1", *server),
        ]
        self.http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60
        )

    def __enter__(self) -> Rig:
        try:
            return self.start()
        except BaseException:
            self.stop()  # a process that came up too late would outlive the tests
            raise

    def start(self, wait: bool = True) -> Rig:
        self.cartridges.parent.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "TOKASAURUS_API_KEY": TOKEN,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [str(part) for part in self._command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.cartridges.parent,
            )
        if wait:
            self.wait_up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def wait_up(self) -> None:
        until(self.is_up, f"the gateway answers (log: {self.log_file})", timeout_s=240)

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.log
        try:
            # Its own client: httpx.get() makes a TLS context, 60 ms of computing, at every look.
            return self.http.get("/ping", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def child(self) -> psutil.Process:
        """The server process."""
        [child] = psutil.Process(self.process.pid).children()
        return child

    def put(self, version: str, body: bytes, **headers: str) -> httpx.Response:
        return self.http.put(f"/cartridges/{version}", content=body, headers=headers)

    def complete(self, version: str | None = None, **more: Any) -> httpx.Response:
        return self.http.post(COMPLETIONS, json=completion(version, **more))

    def metric(self, name: str) -> float:
        """One value of ``/metrics``, by its name with labels, without the common prefix."""
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"cartridge_gateway_{name} "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def on_disk(self) -> list[str]:
        """Everything in the cartridge directory but the empty staging folder."""
        staging = self.cartridges / ".staging"
        until(lambda: not any(staging.iterdir()), "what was deleted is gone")
        return sorted(p.name for p in self.cartridges.iterdir() if p.name != ".staging")
