"""What rollouts that are asked for ahead gain: seconds a step, by `async_steps` and server.

    python benchmarks/overlap.py                      # four runs, 20 minutes on two cores
    python benchmarks/overlap.py --delays 2 --async-steps 0 1 --servers busy

Whole runs: veRL, Ray, HTTP, the embedded server with a small model. In front of the server stands
one that takes its time, as a rented GPU or a network does:

busy   a batch of rollouts takes it so many seconds, and the next batch waits for its turn
far    each answer arrives so many seconds later, however many are under way

A step of a strict run (0) is rollout + update + sync. Ahead of a busy server it cannot be shorter
than the longer of rollout and update, which is the floor in the table. A far server works on
several batches at once, so more steps ahead go below its rollout's seconds, down to the update.

One run a number of steps ahead: the server changes its ways every `--steps` steps. The first steps
of each way, while the batches ahead are those of the way before, are left out. How old the rollouts
were stands beside the seconds; what that does to a cartridge is not measured here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.arguments import require_at_least  # noqa: E402
from benchmarks.bases import machine  # noqa: E402
from cartridge_distill.server.running import BackgroundServer  # noqa: E402
from cartridge_distill.server.settings import ServerSettings  # noqa: E402
from cartridge_distill.util.errors import CartridgeDistillError  # noqa: E402
from cartridge_distill.util.processes import Supervisor, say, tail  # noqa: E402
from tests.tiny import byte_tokenizer, tiny_model  # noqa: E402
from tests.two_servers import Answer, Asked, serving  # noqa: E402
from verl_patches.launching.command import command, environment  # noqa: E402
from verl_patches.launching.settings import Run  # noqa: E402

SERVERS = ("busy", "far")
Way = tuple[str, float]
"""One of :data:`SERVERS`, and the seconds that a batch takes it."""

_TEXT = "The harbour master keeps the keys of every house but one, and that one has no door. " * 8
_SHAPE: dict[str, Any] = {
    **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4},
    **{"head_dim": 64, "max_position_embeddings": 1024},
}


class Delays:
    """When an answer may leave, rollout after rollout.

    Args:
        ways: a server and its seconds a batch, one after the other.
        steps: so many batches each.
        batch: rollouts.
    """

    def __init__(self, ways: Sequence[Way], steps: int, batch: int) -> None:
        self._ways, self._steps, self._batch = list(ways), steps, batch
        self._asked = 0
        self._free_at = 0.0
        self._lock = threading.Lock()

    def due(self, now: float) -> float:
        """The moment at which the next rollout, which is asked for now, is ready."""
        with self._lock:
            place = self._asked // (self._steps * self._batch)
            self._asked += 1
            server, seconds = self._ways[min(place, len(self._ways) - 1)]
            if server == "far":
                return now + seconds
            self._free_at = max(now, self._free_at) + seconds / self._batch
            return self._free_at

    def in_front_of(self, url: str) -> Callable[[Asked], Answer]:
        """Passes requests on to a server; its answers leave when they are due.

        Probes of one token pass at once: they are no rollouts.
        """

        def answer(asked: Asked) -> Answer:
            due = 0.0
            if asked.method == "POST" and json.loads(asked.body)["max_tokens"] > 1:
                due = self.due(time.monotonic())
            kind = {"Content-Type": "application/json"}
            found = httpx.request(
                asked.method, url + asked.path, content=asked.body, headers=kind, timeout=300
            )
            time.sleep(max(0.0, due - time.monotonic()))  # this is what the server is for
            return found.status_code, kind, found.content

        return answer


@dataclass(frozen=True)
class Found:
    """Mean seconds of steady steps, and how old their rollouts were."""

    step: float
    waits: float
    update: float
    staleness: float


def write_inputs(folder: Path, batch: int, steps: int) -> None:
    """Model, tokenizer, document and prompts."""
    tiny_model(**_SHAPE).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "documents.jsonl").write_text(json.dumps({"document_id": "harbour", "text": _TEXT}))
    rows = range(batch * steps)
    prompts = [[{"role": "user", "content": f"Who keeps key {row}?"}] for row in rows]
    info = [{"index": row, "document_id": "harbour"} for row in rows]
    frame = pd.DataFrame({"prompt": prompts, "data_source": "overlap", "extra_info": info})
    for name in ("train", "val"):
        frame.to_parquet(folder / f"{name}.parquet")


@contextmanager
def delayed_server(folder: Path, delays: Delays) -> Iterator[str]:
    """The embedded server behind its delays; gives the URL."""
    settings = ServerSettings(cartridge_dir=folder / "cartridges")
    with (
        BackgroundServer(tiny_model(**_SHAPE), byte_tokenizer(), settings, threads=1) as server,
        serving(delays.in_front_of(server.url)) as front,
    ):
        yield front.url


def trained(
    options: argparse.Namespace, inputs: Path, folder: Path, ways: Sequence[Way], async_steps: int
) -> list[dict[str, Any]]:
    """One whole run; the metrics of its steps.

    Raises:
        CartridgeDistillError: it failed; the end of its log is in the message.
    """
    delays = Delays(ways, options.steps, options.batch)
    total = options.steps * len(ways)
    folder.mkdir()
    with delayed_server(folder, delays) as url, Supervisor() as supervisor:
        run = Run(
            model=f"{inputs}/model",
            data=inputs,
            server=(url,),
            out=folder,
            name="run",
            sync_dir=folder / "cartridges",
            tokens=64,
            batch=options.batch,
            steps=total,
            prompt_tokens=64,
            response_tokens=options.response_tokens,
            device="cpu",
            threads=1,
            save_every=total,
            overrides=(
                f"actor_rollout_ref.actor.cartridge.async_steps={async_steps}",
                "actor_rollout_ref.rollout.custom.client.read_timeout_s=600",
                "trainer.logger=[file]",
            ),
        )
        log = folder / "train.log"
        if supervisor.start(command(run), log, environment(run)).wait() != 0:
            raise CartridgeDistillError(f"the run failed:\n{tail(log)}")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["data"] for line in lines]


def steady(metrics: list[dict[str, Any]], async_steps: int) -> Found:
    """What the steps after the beginning took.

    Raises:
        CartridgeDistillError: the run was too short to have such steps.
    """
    steps = metrics[async_steps + 2 :]
    if not steps:
        raise CartridgeDistillError(
            f"{len(metrics)} steps are no more than the beginning of {async_steps} steps ahead; "
            "give more --steps"
        )

    def mean(name: str) -> float:
        return statistics.mean(step[name] for step in steps)

    return Found(
        step=mean("timing_s/step"),
        waits=mean("timing_s/rollout"),
        update=mean("timing_s/update"),
        staleness=mean("training/staleness"),
    )


def table(options: argparse.Namespace, scratch: Path) -> None:
    """Trains once for each number of steps ahead, and prints the table."""
    ways: list[Way] = list(itertools.product(options.servers, options.delays))
    inputs = scratch / "inputs"
    inputs.mkdir()
    write_inputs(inputs, options.batch, options.steps * len(ways))
    found: dict[tuple[Way, int], Found] = {}
    for ahead in options.async_steps:
        start = time.monotonic()
        metrics = trained(options, inputs, scratch / f"ahead-{ahead}", ways, ahead)
        say(f"   {ahead} ahead: {time.monotonic() - start:.0f} s")
        for number, way in enumerate(ways):
            first = number * options.steps
            found[way, ahead] = steady(metrics[first : first + options.steps], ahead)
    say("\n| server | s a batch | async_steps | s a step | floor | waits | update | staleness |")
    say("|---|--:|--:|--:|--:|--:|--:|--:|")
    for way, ahead in itertools.product(ways, options.async_steps):
        one, strict = found[way, ahead], found.get((way, 0))
        floor = "" if strict is None else f"{max(strict.waits, one.update):.1f}"
        say(
            f"| {way[0]} | {way[1]:g} | {ahead} | {one.step:.1f} | {floor} | {one.waits:.1f} | "
            f"{one.update:.1f} | {one.staleness:.1f} |"
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    option("--delays", nargs="+", type=float, default=[2, 8], help="seconds a batch (2 8)")
    option("--async-steps", nargs="+", type=int, default=[0, 1, 2, 4], help="(0 1 2 4)")
    option("--steps", type=int, default=12, help="for each server and delay (%(default)s)")
    option("--batch", type=int, default=32, help="rollouts of a step (%(default)s)")
    option("--response-tokens", type=int, default=16, help="(%(default)s)")
    options = parser.parse_args(arguments)
    require_at_least(parser, options, steps=1, batch=1, response_tokens=2)
    if min(options.delays) < 0:
        parser.error(f"--delays {min(options.delays):g}: must be at least 0")
    if min(options.async_steps) < 0:
        parser.error(f"--async-steps {min(options.async_steps)}: must be at least 0")
    if max(options.async_steps) + 3 > options.steps:
        parser.error(
            f"--steps {options.steps}: must be at least {max(options.async_steps) + 3}, or a run "
            f"of --async-steps {max(options.async_steps)} has no steady step"
        )
    options.async_steps.sort()
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(arguments)
    start = time.monotonic()
    say(
        f"machine: {machine('cpu')}, load {os.getloadavg()[0]:.1f} at the start; "
        f"torch {torch.__version__}; {options.batch} rollouts of {options.response_tokens} tokens "
        f"a step, {options.steps} steps for each server and delay"
    )
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            table(options, Path(name))
    except KeyboardInterrupt:
        print("\nstopped; every process of the benchmark was ended", flush=True)
        return 130
    except (CartridgeDistillError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    say(f"\n{time.monotonic() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
