"""The whole path on a second real model, Gemma 3 270M: from the wheels to the served cartridge.

Another family than the demo's: a SentencePiece vocabulary of 262,144 tokens, sliding windows, a
begin-of-text token of its own, no chat template. Nothing here is replaced: veRL trains, the server
is a process, the requests are HTTP.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.training.conftest import ROOT, child_environment

CLI = ("-m", "cartridge_distill.cli.main")
QUESTION = "Who is the patient's emergency contact?"
STEPS = 3


def run(*arguments: object, cwd: Path = ROOT) -> str:
    """Standard output of this Python with these arguments; a failure shows all that was said."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=child_environment(),
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@contextmanager
def serving(log: Path, ready: str, *arguments: object) -> Iterator[str]:
    """``cartridge-distill serve`` on a free port, until the path ``ready`` answers; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, *CLI, "serve", *map(str, arguments), "--port", str(port)]
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, env=child_environment(), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        while True:
            assert server.poll() is None, log.read_text()[-6000:]
            try:
                if httpx.get(url + ready, timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait()


@pytest.mark.long
@pytest.mark.integration
@pytest.mark.timeout(3600)
def test_the_whole_path_on_gemma_3_270m(tmp_path: Path) -> None:
    # Convert; what is in the cache and whole is only verified.
    model = run("training/get_demo_model.py", "--model", "gemma-3-270m").strip()
    data, out = tmp_path / "data", tmp_path / "run"

    run(*CLI, "prepare", "--tokenizer", model, "--rows", 12, "--val-rows", 4, "--out", data)
    document = json.loads((data / "documents.jsonl").read_text().splitlines()[0])
    (tmp_path / "document.txt").write_text(document["text"])

    untrained = tmp_path / "untrained"
    made = ("--document", tmp_path / "document.txt", "--tokens", 64)
    run(*CLI, "init", untrained, "--model", model, *made)
    assert f"fits {model}" in run(*CLI, "info", untrained, "--model", model)

    with serving(tmp_path / "rollout.log", "/ping", "--model", model) as url:
        settings = ("--device", "cpu", "--tokens", 64, "--batch", 4, "--steps", STEPS)
        settings += ("--response-tokens", 6, "--prompt-tokens", 192)
        said = run(
            *CLI,
            "train",
            "--model",
            model,
            "--data",
            data,
            "--server",
            url,
            "--out",
            out,
            *settings,
        )
    assert re.search(rf"step {STEPS}/{STEPS} ", said), said
    lines = [json.loads(line)["data"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "actor/loss" in line]
    assert len(steps) == STEPS
    for step in steps:
        assert 0 < step["actor/loss"] < 20
        assert step["actor/logprob_diff/max"] < 1e-3  # server and trainer agree
        assert step["actor/frozen_tokens_changed"] == 0

    cartridge = out / "checkpoints" / f"global_step_{STEPS}" / "actor" / "cartridge"
    scores = ("--data", data, "--cartridge", cartridge, "--out", out / "evaluation")
    run(*CLI, "eval", "--model", model, *scores, "--limit", 4)
    found = json.loads((out / "evaluation" / "evaluation.json").read_text())
    scores_of = {row["condition"]: row["metrics"] for row in found["conditions"]}
    assert len(scores_of) == 5 and scores_of["full document"]["kl"]["mean"] < 1e-3
    losses = {name: scores["log_loss"]["mean"] for name, scores in scores_of.items()}
    assert losses["full document"] < losses["no document"], losses

    # Greedy, in float32: transformers' own attention and the server's say the same.
    asked = ("--prompt", QUESTION, "--max-new-tokens", 12, "--dtype", "float32")
    answer = run(*CLI, "chat", "--model", model, "--cartridge", cartridge, *asked).strip()
    assert len(set(re.findall(r"\w+", answer))) > 3, answer
    named = ("--model", model, "--cartridge", f"patient={cartridge}")
    with serving(tmp_path / "chat.log", "/ping", *named) as url:
        models = httpx.get(f"{url}/v1/models").json()["data"]
        assert "patient" in [card["id"] for card in models]
        body = {"model": "patient", "max_tokens": 12, "temperature": 0}
        body["messages"] = [{"role": "user", "content": QUESTION}]
        answered = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)
    assert answered.status_code == 200, answered.text
    assert answered.json()["choices"][0]["message"]["content"].strip() == answer
