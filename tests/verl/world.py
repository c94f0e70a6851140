"""A world for whole runs: an embedded server, a proxy before it that can break answers, and data.

The proxy stands between trainer and server, as a cloud's front door would. Each run is a process of
its own, started as a user starts it. The fixture ``world`` (``conftest.py``) makes one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pandas as pd

from cartridge_distill.data.records import Question, save_questions
from cartridge_distill.model.prompts import render_document
from cartridge_distill.server.running import BackgroundServer
from cartridge_distill.server.settings import ServerSettings
from cartridge_distill.util.processes import Supervisor
from tests.gateway.rig import MODEL_NAME
from tests.tiny import byte_tokenizer, tiny_model
from verl_patches.launching.command import command, environment
from verl_patches.launching.settings import Run
from verl_patches.rollout.run_ids import RUNS_FILE
from verl_patches.trainer.history import HISTORY_FILE
from verl_patches.trainer.run_folder import TRACKER

ROOT = Path(__file__).resolve().parents[2]
ROWS, STEPS, CARTRIDGE = 4, 3, 160
OVER_HTTP = [
    "actor_rollout_ref.actor.cartridge.transport=http",
    "actor_rollout_ref.actor.cartridge.sync_dir=null",
    f"actor_rollout_ref.actor.cartridge.sync_base_model={MODEL_NAME}",
    "actor_rollout_ref.rollout.custom.client.max_attempts=8",
    "actor_rollout_ref.rollout.custom.client.backoff_s=0.5",
    "actor_rollout_ref.rollout.custom.client.read_timeout_s=60",
]


class FaultyProxy:
    """A reverse proxy that spoils completions: ``spoil(number, body)`` may change or answer one."""

    def __init__(self, target: str, port: int = 0) -> None:
        self.target, self.spoil = target, lambda number, body: None
        self.cold = False  # answers 503 to everything, as a front door before a cold container
        self.completions = 0
        self._lock = threading.Lock()
        faulty = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if faulty.cold:
                    self.forward(httpx.Response(503, text="starting"))
                else:
                    self.forward(httpx.get(faulty.target + self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with faulty._lock:
                    faulty.completions += 1
                    number = faulty.completions
                answer = faulty.spoil(number, body)
                if answer is None:
                    answer = httpx.post(faulty.target + self.path, json=body, timeout=60)
                self.forward(answer)

            def forward(self, answer: httpx.Response) -> None:
                self.send_response(answer.status_code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer.content)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # a client that lost its patience
                    self.wfile.write(answer.content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@dataclass
class World:
    """A server with its directory, the proxy before it, and data whose document is 160 tokens."""

    folder: Path
    proxy: FaultyProxy
    metrics: list[dict[str, Any]] = field(default_factory=list)

    def loaded(self) -> list[str]:
        ids: list[str] = httpx.get(f"{self.proxy.target}/custom/cartridge/loaded").json()["ids"]
        return ids

    def run(self, *overrides: str) -> tuple[int, str]:
        """One run; returns its exit status and its log."""
        folder = self.folder
        client = "actor_rollout_ref.rollout.custom.client"
        run = Run(
            model=f"{folder}/model",
            data=folder,
            server=(self.proxy.url,),
            out=folder,
            name="run",
            sync_dir=folder / "cartridges",
            tokens=CARTRIDGE,
            batch=ROWS,
            steps=STEPS,
            prompt_tokens=64,
            response_tokens=8,
            device="cpu",
            threads=1,
            save_every=STEPS,
            overrides=(
                f"{client}.max_attempts=3",
                f"{client}.backoff_s=0.05",
                f"{client}.read_timeout_s=5",
                f"{client}.startup_timeout_s=5",
                "trainer.total_epochs=1",
                "trainer.logger=[file]",
                *overrides,
            ),
        )
        log = folder / "train.log"
        with Supervisor() as supervisor:
            status = supervisor.start(command(run), log, environment(run)).wait(timeout=300)
        metrics = folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        self.metrics = [json.loads(line)["data"] for line in lines]
        return status, log.read_text(errors="replace")


@contextmanager
def made_world(folder: Path) -> Iterator[World]:
    """The world in ``folder``; its server ends with the block."""
    tokenizer = byte_tokenizer()
    tiny_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    text = "The harbour master keeps the keys. " * 10
    text = text[: len(text) - (len(render_document(tokenizer, text)) - CARTRIDGE)]
    assert len(render_document(tokenizer, text)) == CARTRIDGE
    (folder / "documents.jsonl").write_text(json.dumps({"document_id": "harbour", "text": text}))
    question = Question("harbour", "Who keeps them?", ("The harbour master", "No one"), 0)
    save_questions(folder / "eval.json", [question])
    prompts = [
        [
            {"role": "user", "content": "Who?" * (1 + row % 3)},
            {"role": "assistant", "content": "The h"},
        ]
        for row in range(ROWS * STEPS)
    ]
    info = [{"index": n, "document_id": "harbour"} for n in range(len(prompts))]
    frame = pd.DataFrame({"prompt": prompts, "data_source": "test", "extra_info": info})
    for name in ("train", "val"):
        frame.to_parquet(folder / f"{name}.parquet")
    settings = ServerSettings(cartridge_dir=folder / "cartridges")
    with BackgroundServer(tiny_model(), tokenizer, settings, threads=1) as server:
        yield World(folder, FaultyProxy(server.url))


def as_it_was_after(run: Path, step: int, target: Path) -> Path:
    """What a run that died after this step leaves, and half a save of the next one."""
    shutil.copytree(run / f"global_step_{step}", target / f"global_step_{step}")
    (target / TRACKER).write_text(str(step))
    shutil.copy(run / RUNS_FILE, target)
    shutil.copy(run / HISTORY_FILE, target)  # with lines of later steps, as a killed save leaves
    shutil.copytree(
        run / f"global_step_{step + 1}" / "actor" / "cartridge",
        target / f"global_step_{step + 1}" / "actor" / "cartridge",
    )
    return target
