"""The warm-up of the image, with real processes as the server."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest
from warm_up import main

# Answers like Tokasaurus where the warm-up asks, and leaves a child behind if it is let.
SERVER = """
import http.server, json, os, pathlib, subprocess, sys, time

port, folder, status = int(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
staying = "import time; time.sleep(600)"  # to be there when the test looks whether it was ended
worker = subprocess.Popen([sys.executable, "-c", staying])
(folder / "worker").write_text(str(worker.pid))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, {"message": "pong"})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open(folder / "requests", "a") as log:
            log.write(json.dumps([self.path, body]) + "\\n")
        self.answer(status, {"detail": "no such prompt"})
    def answer(self, code, body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *arguments):
        pass

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def arguments(folder: Path, status: int) -> list[str]:
    port = str(free_port())
    (folder / "server.py").write_text(SERVER)
    server = [sys.executable, str(folder / "server.py"), port, str(folder), str(status)]
    return ["--url", f"http://127.0.0.1:{port}", "--patience", "30", "--", *server]


def is_gone(process: int) -> bool:
    """Killed; what is left until it is reaped is a zombie."""
    for _ in range(100):
        try:
            os.kill(process, 0)
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_server_generates_and_is_ended_with_its_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(tmp_path, 200))
    requests = (tmp_path / "requests").read_text()
    assert requests.count("/v1/completions") == 2
    assert '"max_tokens": 32' in requests
    assert "its kernels are compiled" in capsys.readouterr().out
    assert is_gone(int((tmp_path / "worker").read_text()))


def test_refused_request_ends_the_build(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="HTTP 422.*no such prompt"):
        main(arguments(tmp_path, 422))
    assert is_gone(int((tmp_path / "worker").read_text()))


def test_server_that_does_not_start_ends_the_build() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(SystemExit, match="ended with code 3 while starting"):
        main(["--url", url, "--", sys.executable, "-c", "raise SystemExit(3)"])


def test_server_that_never_answers_ends_the_build() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    silent = "import time; time.sleep(600)"  # the sleep is the fault; 1 s of patience ends it
    sleeper = [sys.executable, "-c", silent]
    with pytest.raises(SystemExit, match="no answer from .*/ping after 1 s"):
        main(["--url", url, "--patience", "1", "--", *sleeper])
