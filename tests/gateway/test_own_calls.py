"""What the gateway asks its server process, it asks nobody else: redirects are not followed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cartridge_distill.gateway.app import create_app
from cartridge_distill.gateway.settings import GatewaySettings
from tests.gateway.rig import COMPLETIONS, MODEL_NAME, completion, upload_bytes
from tests.two_servers import TestServer, serving

pytestmark = pytest.mark.integration
# Answers /ping, and sends everything else elsewhere, body and all.
_REDIRECTS = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200 if self.path == "/ping" else int(sys.argv[3]))
        self.send_header("Location", sys.argv[2] + self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = answer

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def elsewhere() -> Iterator[TestServer]:
    with serving() as server:
        yield server


@pytest.mark.parametrize("status", [302, 307])
async def test_a_server_process_that_redirects(
    status: int,
    elsewhere: TestServer,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "cartridge_distill.gateway.app.server_command",
        lambda _, port: [sys.executable, "-c", _REDIRECTS, str(port), elsewhere.url, str(status)],
    )
    settings = GatewaySettings(
        model=str(model_folder), model_name=MODEL_NAME, cartridge_dir=tmp_path, drain_s=0
    )
    app = create_app(settings, token=None)
    way = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=way, base_url="http://localhost", timeout=60) as http,
    ):
        body = completion()
        answers = [
            await http.post(COMPLETIONS, json=body),
            await http.put("/cartridges/run-step-000001", content=upload_bytes()),
        ]
        for answer in answers:
            assert answer.status_code == 503 and "redirect" in answer.json()["detail"]
        assert (await http.get("/cartridges")).json()["cartridges"] == []
    assert elsewhere.asked == []
