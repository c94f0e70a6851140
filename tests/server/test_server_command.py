"""`python -m cartridge_distill.server`."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.fingerprint import Completion
from tests.server.asking import IDS

COMMAND = [sys.executable, "-m", "cartridge_distill.server"]


def test_help_teaches() -> None:
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for word in ("--cartridge-dir", "multiple of 16", "loaded ONCE", "/ping", "10210", "--threads"):
        assert word in done.stdout


def test_command_line_serves_and_ends_on_sigterm(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.listen()
        command = [*COMMAND, "--model", str(folder), "--port", str(port), "--threads", "1"]
        command += ["--cartridge-dir", str(tmp_path / "cartridges")]
        # Said at once, not after loading a model for minutes.
        taken = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert taken.returncode == 1 and "another --port" in taken.stderr
    assert "loading" not in taken.stdout
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:

        async def ask() -> list[Completion]:
            async with TokasaurusClient(f"http://127.0.0.1:{port}") as client:
                await client.wait_until_ready()
                return await client.complete(IDS, 3, 0.7)

        assert len(asyncio.run(ask())[0].token_ids) <= 3
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "stopped" in output and "Traceback" not in output
