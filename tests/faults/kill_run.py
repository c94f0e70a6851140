"""The small run that ``kill_harness.py`` kills: its data, its processes, the killing itself.

Real veRL, real Ray, a real gateway over HTTP; a Llama of two layers with random weights. Rollouts
are greedy, through veRL's own ``__do_sample__`` column: a run then repeats to the last bit,
whatever its run id is and however often its server was started. The data is shuffled and walked
through several times and the learning rate follows a schedule, so that a resume that lost its place
shows.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
from transformers import AutoTokenizer

from cartridge_distill.util.processes import Supervisor, tail
from tests.faults.kill_phases import MARKS_VARIABLE, Mark, read_marks
from tests.gateway.rig import MODEL_NAME, Rig, child_environment
from tests.tiny import endless_model, save_model
from verl_patches.launching.command import command, environment
from verl_patches.launching.preloading import PRELOADED
from verl_patches.launching.settings import Run

ROWS = 4  # prompts a step
STEPS_PER_EPOCH = 8
CARTRIDGE_TOKENS = 32
_TEXT = "The harbour master keeps the keys of every house but one, and that one has no door. " * 2
_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# What Ray calls the processes. The driver is veRL's command, which is no actor.
ACTORS = {
    "task-runner": "TaskRunnerV1",
    "worker": "WorkerDict",
    "proxy": "TokasaurusHttpServer",
    "agent-loop": "_CartridgeAgentLoopWorker",
    "storage": "SimpleStorageUnit",
}


def write_inputs(folder: Path, seed: int) -> None:
    """Model, tokenizer, document and prompts; the same for the same seed."""
    save_model(endless_model(seed, max_position_embeddings=1024), folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    # The model never ends an answer by itself; veRL wants to know these ids all the same.
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    (folder / "documents.jsonl").write_text(json.dumps({"document_id": "harbour", "text": _TEXT}))
    rows = range(ROWS * STEPS_PER_EPOCH)
    frame = pd.DataFrame(
        {
            "prompt": [
                [{"role": "user", "content": f"Who keeps key {n}{'?' * (n % 5)}"}] for n in rows
            ],
            "data_source": "kill_harness",
            "extra_info": [{"index": n, "document_id": "harbour"} for n in rows],
            "__do_sample__": False,
        }
    )
    for name in ("train", "val"):
        frame.to_parquet(folder / f"{name}.parquet")


@dataclass
class Victim:
    """A process to be killed, and when it began, in seconds since the epoch."""

    pid: int
    name: str
    began: float

    def kill(self) -> float:
        """SIGKILL; returns the moment.

        Raises:
            ProcessLookupError: it has ended by itself.
        """
        now = time.time()
        os.kill(self.pid, signal.SIGKILL)
        return now


def gateway_victim(rig: Rig, name: str) -> Victim | None:
    """``gateway``, or ``server`` behind it; None between two servers."""
    process = psutil.Process(rig.process.pid) if name == "gateway" else rig.server_process()
    return Victim(process.pid, name, process.create_time()) if process is not None else None


class Attempt:
    """One start of the run: its processes, its log, its marks.

    Args:
        folder: of this attempt; log and marks.
        run: ``trainer.default_local_dir``, which all attempts of a run share.
        inputs: what :func:`write_inputs` wrote.
    """

    def __init__(
        self, supervisor: Supervisor, folder: Path, run: Path, inputs: Path, url: str, steps: int
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._supervisor = supervisor
        self.log, self._marks = folder / "train.log", folder / "marks.txt"
        asked = training(run, inputs, url, steps)
        inherited = {**os.environ, **child_environment()}
        settings = {**child_environment(), **environment(asked, inherited)}
        settings[MARKS_VARIABLE] = str(self._marks)
        run.mkdir(parents=True, exist_ok=True)
        self.began = time.time()
        supervisor.preload(PRELOADED, settings)  # as the launcher does
        self.process = supervisor.start(command(asked), self.log, settings)

    def marks(self) -> list[Mark]:
        return read_marks(self._marks)

    def words(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace")

    def tail(self) -> str:
        return tail(self.log)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def victim(self, name: str) -> Victim | None:
        """``driver`` or one of :data:`ACTORS`; None while there is none."""
        if name == "driver":
            return Victim(self.process.pid, name, self.began)
        for process in self._supervisor.marked():  # forked ones are no descendants
            try:
                title = " ".join(process.cmdline())
                if re.match(rf"ray::{ACTORS[name]}\b", title):
                    return Victim(process.pid, name, process.create_time())
            except psutil.NoSuchProcess:
                pass  # it ended between two looks
        return None

    def left_behind(self) -> list[psutil.Process]:
        """Processes of this attempt that still run."""
        return list(self._supervisor.marked())


def training(run: Path, inputs: Path, url: str, steps: int) -> Run:
    """The run that veRL is asked for."""
    rollout = "actor_rollout_ref.rollout"
    return Run(
        model=f"{inputs}/model",
        data=inputs,
        server=(url,),
        out=run,
        name="run",
        served_model=MODEL_NAME,
        tokens=CARTRIDGE_TOKENS,
        batch=ROWS,
        steps=steps,
        temperature=1.0,  # what greedy log-probs are divided by
        prompt_tokens=64,
        response_tokens=6,
        device="cpu",
        threads=1,
        save_every=1,
        overrides=(
            # The gateway's server takes seconds to come back.
            f"{rollout}.custom.client.max_attempts=60",
            f"{rollout}.custom.client.backoff_s=0.2",
            f"{rollout}.custom.client.max_backoff_s=2",
            f"{rollout}.agent.agent_loop_manager_class="
            "tests.faults.kill_marks.MarkedAgentLoopManager",
            "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine",
            "actor_rollout_ref.actor.optim.lr_warmup_steps=2",
            "trainer.logger=[file]",
            f"trainer.total_epochs={-(-steps // STEPS_PER_EPOCH)}",
            f"trainer.default_local_dir={run}",
        ),
    )
