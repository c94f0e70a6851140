"""A real HTTP server on the loopback that misbehaves as it is told, and the client that asks it."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.rollout.http import ClientSettings
from cartridge_distill.rollout.protocol import CartridgeRef

FAST = ClientSettings(
    max_attempts=3,
    backoff_s=0.01,
    max_backoff_s=0.05,
    connect_timeout_s=2.0,
    read_timeout_s=5.0,
    startup_timeout_s=5.0,
)
GOOD = Completion([5, 6], [-0.5, -1.5], "stop")


def floats(*values: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def answer(ids: Any = None, logprobs: list[float] | None = None, **changes: Any) -> bytes:
    fingerprint = {
        "completion_ids": [[5, 6]] if ids is None else ids,
        "packed_chosen_logprobs": [floats(*([-0.5, -1.5] if logprobs is None else logprobs))],
        "packed_topk_indices": None,
        "packed_topk_logprobs": None,
    }
    body = {
        "id": "x",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "text": "a", "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        "system_fingerprint": json.dumps(fingerprint),
    }
    return json.dumps(body | changes).encode()


class Script:
    """What the server does with its first, second, ... request; the last entry repeats."""

    def __init__(self) -> None:
        self.steps: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.url = ""
        self.over = threading.Event()

    def play(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        body = json.loads(handler.rfile.read(length)) if length else None
        self.requests.append((handler.path, dict(handler.headers), body))
        self.steps[min(len(self.requests), len(self.steps)) - 1](handler)

    def status(
        self, code: int, body: bytes = b'{"detail": "out of order"}', **headers: str
    ) -> Callable[[BaseHTTPRequestHandler], None]:
        def act(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(code)
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)

        return act

    def ok(self, body: bytes | None = None) -> Callable[[BaseHTTPRequestHandler], None]:
        return self.status(200, answer() if body is None else body)

    def hang(self, handler: BaseHTTPRequestHandler) -> None:
        self.over.wait(30)
        handler.close_connection = True

    def cut(self, handler: BaseHTTPRequestHandler) -> None:
        """Promises more bytes than it sends, then closes."""
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(answer())))
        handler.end_headers()
        handler.wfile.write(answer()[:100])
        handler.close_connection = True

    def drop(self, handler: BaseHTTPRequestHandler) -> None:
        """Closes without a word."""
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)


class ScriptedHandler(BaseHTTPRequestHandler):
    """Plays the script of its class."""

    protocol_version = "HTTP/1.1"
    script: Script

    def do_POST(self) -> None:
        self.script.play(self)

    def do_GET(self) -> None:
        self.script.play(self)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def ask(url: str, settings: ClientSettings = FAST, n: int = 1) -> list[Completion]:
    async def run() -> list[Completion]:
        async with TokasaurusClient(url, settings, vocab_size=100) as client:
            refs = [CartridgeRef(id="v1", source="local")]
            return await client.complete([1, 2], 4, 0.7, refs, n=n)

    return asyncio.run(run())


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
