"""`cartridge-distill serve --engine vllm` as a process, with a program that stands for vLLM.

The real one is in tests/engines/vllm/test_openai.py.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, save_cartridge
from tests.gateway.rig import until
from tests.tiny import random_cartridge, tiny_model
from tests.training.conftest import child_environment

pytestmark = pytest.mark.integration

_ENGINE = """#!/bin/sh
echo $$ "$@" > {said}.part && mv {said}.part {said}
exec sleep 600  # to be there until it is ended
"""


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A program that notes its pid and its arguments, and stays."""
    program = tmp_path / "python"
    program.write_text(_ENGINE.format(said=tmp_path / "said"))
    program.chmod(0o755)
    return program


def command(model_folder: Path, engine: Path, port: int) -> list[str]:
    meta = CartridgeMeta(base_model=str(model_folder))
    made = save_cartridge(random_cartridge(tiny_model(), 16), engine.parent / "anna", meta)
    typed = [sys.executable, "-m", "cartridge_distill.cli.main", "serve", "--engine", "vllm"]
    typed += ["--engine-python", str(engine), "--model", str(model_folder)]
    return [*typed, "--cartridge", f"anna={made}", "--port", str(port)]


def test_vllm_ends_with_the_command(model_folder: Path, engine: Path) -> None:
    said = engine.parent / "said"
    process = subprocess.Popen(
        command(model_folder, engine, port=0),
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until(lambda: said.exists() or process.poll() is not None, "vLLM is started")
        pid, *words = said.read_text().split()
        process.terminate()
        printed = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 0, printed
    until(lambda: not psutil.pid_exists(int(pid)), "vLLM has ended")
    port = words[words.index("--port") + 1]
    assert int(port) > 0 and re.search(rf"http://127\.0\.0\.1:{port}/v1", printed)


def test_a_port_that_is_taken_is_said_before_vllm_is_started(
    model_folder: Path, engine: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = subprocess.run(
            command(model_folder, engine, taken.getsockname()[1]),
            env=child_environment(),
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1 and "choose another --port" in " ".join(done.stderr.split())
    assert not (engine.parent / "said").exists()
