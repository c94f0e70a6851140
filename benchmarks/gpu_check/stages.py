"""The stages of the GPU check: what runs, for how long at most, and where its figures are.

A stage is a command that appends figures, a JSON object a line, to a file of its own as soon as it
has them. What a stage did before it failed or was cut off is therefore kept. The demo writes the
files of a run instead; :func:`demo_figures` takes the figures out of those.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bases import LLAMA_3B, TINY

Figures = list[dict[str, Any]]


@dataclass(frozen=True)
class Setup:
    """What all stages share.

    Attributes:
        out: the check's folder.
        model: folder of the real model; None where it cannot be had, see ``no_model``.
        small: a rehearsal; every stage at toy size.
    """

    device: str
    out: Path
    model: str | None
    small: bool
    threads: int
    no_model: str = ""

    def figures_of(self, name: str) -> Path:
        return self.out / "figures" / f"{name}.jsonl"

    def log_of(self, name: str) -> Path:
        return self.out / "logs" / f"{name}.log"


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        seconds: its time limit.
        arguments: of this Python; the last two say where the figures go, the demo's excepted.
        needs_model: whether it is skipped, as failed, without the real model.
        reserved: of the budget, seconds that stages before it may not use.
        collect: takes the figures from elsewhere than the stage's file.
    """

    name: str
    seconds: float
    arguments: list[str]
    needs_model: bool = False
    reserved: float = 0.0
    collect: Callable[[Setup], Figures] | None = None

    def command(self) -> list[str]:
        return [sys.executable, *self.arguments]


def stages(setup: Setup) -> list[Stage]:
    """In the order in which they run; the demo, which says most, has a part of the time kept."""
    small, device = setup.small, ["--device", setup.device]
    shape = ["--shape", TINY if small else LLAMA_3B]

    def stage(name: str, seconds: float, script: list[str], options: str, **more: Any) -> Stage:
        figures = ["--json", str(setup.figures_of(name))]
        return Stage(name, seconds, [*script, *device, *options.split(), *figures], **more)

    packing = "--prefix 2048 --sequences 16 --length 256 --document 10000 --samples 8"
    packing += " --check-sequences 2 --tolerance 0.01"
    if small:
        packing = "--prefix 32 --sequences 3 --length 8 --document 40 --samples 2 --repeats 1"
    memory = "--tokens 32 --document 40 --samples 2 --prompt 4 --response 3" if small else ""
    engine = "--tokens 2048 --work 1x32 8x32 64x32 64x128"
    if small:
        engine = "--tokens 32 --prompt 8 --work 1x3 4x3"
    differences = ["-m", "benchmarks.gpu_check.differences"]
    if small:
        differences += ["--shape", TINY, "--tokens", "32", "--rows", "4"]
    else:
        differences += ["--model", setup.model or ""]
    loop = ["-m", "benchmarks.gpu_check.loop", *shape, "--tokenizer", setup.model or "", *device]
    loop += ["--out", str(setup.out / "loop")]
    if small:
        sizes = "--document 400 --tokens 32 --prompts 4 --response 3 --steps 2 --threads 1"
        loop += sizes.split()
    return [
        stage(
            "kernels",
            120,
            ["-m", "benchmarks.gpu_check.kernels"],
            "--batches 1" if small else "",
        ),
        stage("student", 180, ["benchmarks/packing.py", *shape], packing),
        stage("engine", 60, ["benchmarks/engine.py", *shape], engine),
        stage(
            "sync",
            60,
            ["-m", "benchmarks.gpu_check.sync", *shape],
            "--tokens 32 --repeats 1" if small else "",
        ),
        stage("differences", 60, differences, "", needs_model=not small),
        stage("memory", 100, ["benchmarks/memory.py", *shape], memory),
        Stage(
            "demo",
            300,
            demo_arguments(setup),
            needs_model=True,
            reserved=240,
            collect=demo_figures,
        ),
        Stage("loop", 240, loop, needs_model=True, collect=loop_figures),
    ]


def demo_arguments(setup: Setup) -> list[str]:
    """`make demo` on the device; two steps of a few rollouts in a rehearsal."""
    found = ["training/demo.py", "--device", setup.device, "--model", setup.model or ""]
    found += ["--out", str(setup.out / "demo"), "--threads", str(setup.threads)]
    if setup.small:
        found += ["--steps", "2", "--prompts", "4", "--response", "3", "--test-every", "0"]
    return found


def logged_steps(run: Path) -> list[dict[str, Any]]:
    """The metrics of the steps that a run has finished; none where it did not come to one."""
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        return []
    lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    logged = [json.loads(line)["data"] for line in lines]
    return [step for step in logged if "actor/loss" in step]


def run_figures(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """What every run of veRL tells; a step's seconds without the first, which compiles."""
    seconds = [step["timing_s/step"] for step in steps]
    return {
        "steps": len(steps),
        "first_step_seconds": seconds[0],
        "step_seconds": statistics.mean(seconds[1:] or seconds),
        "logprob_diff_max": max(step["actor/logprob_diff/max"] for step in steps),
        "logprob_diff_mean": statistics.mean(step["actor/logprob_diff/mean"] for step in steps),
        "frozen_tokens_changed": sum(step["actor/frozen_tokens_changed"] for step in steps),
        "loss_first": steps[0]["actor/loss"],
        "loss_last": steps[-1]["actor/loss"],
    }


def demo_figures(setup: Setup) -> Figures:
    """What a run of the demo has written so far."""
    run = setup.out / "demo"
    steps = logged_steps(run)
    if not steps:
        return []
    found = run_figures(steps)
    table = run / "evaluation" / "evaluation.json"
    if table.is_file():
        rows = json.loads(table.read_text())["conditions"]
        found["kl"] = {row["condition"]: row["metrics"]["kl"]["mean"] for row in rows}
    return [found]


def loop_figures(setup: Setup) -> Figures:
    """What the run with a large base has written so far: means of the steps after the first."""
    steps = logged_steps(setup.out / "loop")
    if not steps:
        return []
    later = steps[1:] or steps
    found = run_figures(steps)
    names = ["timing_s/rollout", "timing_s/update", "timing_s/update_weights"]
    names += [name for name in steps[0] if name.startswith("actor/seconds/")]
    found["seconds"] = {
        name.rsplit("/", 1)[1]: statistics.mean(step[name] for step in later) for name in names
    }
    found["tokens"] = statistics.mean(step["tokens/trained"] for step in later)
    found["peak_gib"] = max(step["actor/perf/max_memory_allocated_gb"] for step in steps)
    return [found]


def read_figures(setup: Setup, stage: Stage) -> Figures:
    """A stage's figures, whole lines only: it may have been ended in the middle of one."""
    if stage.collect is not None:
        return stage.collect(setup)
    file = setup.figures_of(stage.name)
    if not file.is_file():
        return []
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
