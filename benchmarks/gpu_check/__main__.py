"""What has to be known of a GPU, in one command of at most ten minutes: `make gpu-check`.

    python -m benchmarks.gpu_check                                   # on a GPU machine
    python -m benchmarks.gpu_check --only kernels student
    python -m benchmarks.gpu_check --device cpu --rehearse           # toy size: do the stages run?

Stages: kernels (every attention kernel against the dense reference), student (and teacher: tokens/s
at Llama-3.2-3B's shape), engine (the embedded server), sync, differences (server against trainer),
memory, demo (the whole loop with veRL and Ray), and, if --only names it, loop (that with a 3B
base, random weights, and a document of 10,000 tokens). Each runs in its own process, has a time
limit, and writes its figures to OUT/figures at once. If one fails, the next one runs.
At the end, and after every stage, OUT/table.md has all of them as a Markdown table.

Exit status: 0 if every stage went well, 1 if not.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.arguments import require_at_least
from benchmarks.bases import ROOT, demo_model, machine
from benchmarks.gpu_check.stages import Figures, Setup, Stage, read_figures, stages
from benchmarks.gpu_check.table import ROWS, Outcome, markdown
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.files import fresh_folder
from cartridge_distill.util.processes import Supervisor, say, tail

_LEAST_SECONDS = 10.0  # with less left, a stage is not begun
_ASKED_FOR = {"loop"}  # runs where --only names it: the others fill ten minutes


def run_stage(stage: Stage, setup: Setup, seconds: float) -> Outcome:
    """One stage, ended with all that it started when its time is over."""
    if stage.needs_model and setup.model is None:
        return Outcome(0.0, f"the demo model is not there: {setup.no_model}")
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(setup.threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    start = time.monotonic()
    log = setup.log_of(stage.name)
    with Supervisor() as supervisor:
        child = supervisor.start(stage.command(), log, environment)
        while child.poll() is None and time.monotonic() - start < seconds:
            time.sleep(0.1)
        status = child.poll()
    took = time.monotonic() - start
    if status is None:
        return Outcome(took, f"over its limit of {seconds:.0f} s")
    return Outcome(took, "" if status == 0 else f"status {status}, see logs/{log.name}")


def deliver_to(folder: Path, setup: Setup) -> None:
    """Everything in two files, for a node from which few files come back."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(setup.out / "table.md", folder / "table.md")
    kept = [setup.out / "figures", setup.out / "logs", setup.out / "demo" / "evaluation"]
    for run in (setup.out / "demo", setup.out / "loop"):
        kept += [run / "metrics.jsonl", *sorted(run.glob("*.log"))]
    part = folder / "check.part"
    with tarfile.open(part, "w:gz") as tar:
        for path in kept:
            if path.exists():
                tar.add(path, path.relative_to(setup.out).as_posix())
    part.replace(folder / "check.tgz")


def run(
    setup: Setup,
    chosen: Sequence[Stage],
    budget: float,
    head: list[str],
    deliver: Path | None = None,
) -> bool:
    """All chosen stages and the table; whether every one went well."""
    start = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    figures: dict[str, Figures] = {}
    for number, stage in enumerate(chosen):
        later = sum(other.reserved for other in chosen[number + 1 :])
        left = budget - (time.monotonic() - start) - later
        # A rehearsal is not about time, and its machine may be a busy one.
        limit = left if setup.small else min(stage.seconds, left)
        say(f"== {stage.name} (at most {max(limit, 0):.0f} s)")
        if left < _LEAST_SECONDS:
            outcome = Outcome(0.0, "not begun: the budget is spent (--budget)")
        else:
            outcome = run_stage(stage, setup, limit)
        figures[stage.name] = read_figures(setup, stage)
        if outcome.good and not figures[stage.name]:
            outcome = Outcome(outcome.seconds, "it ended well, and left no figure")
        outcomes[stage.name] = outcome
        said = "done" if outcome.good else f"FAILED: {outcome.why}"
        say(f"   {said}; {outcome.seconds:.0f} s, {len(figures[stage.name])} figures")
        if not outcome.good and setup.log_of(stage.name).exists():
            say(tail(setup.log_of(stage.name), 12))
        part = setup.out / "table.part"
        part.write_text(markdown(head, figures, outcomes))
        part.replace(setup.out / "table.md")
        if deliver is not None:
            deliver_to(deliver, setup)
    return all(outcome.good for outcome in outcomes.values())


def heading(setup: Setup) -> list[str]:
    """The machine and the versions, for the table."""
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if setup.device == "cuda":
        versions += f", CUDA {torch.version.cuda}"
    made = "a rehearsal at toy size: nothing is measured" if setup.small else "`make gpu-check`"
    day = time.strftime("%Y-%m-%d")
    return [
        f"{machine(setup.device)}; {versions}, Python {platform.python_version()}; {day}; {made}"
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make gpu-check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--device", choices=["cuda", "cpu"], default="cuda", help="(%(default)s)")
    option("--rehearse", action="store_true", help="every stage at toy size; measures nothing")
    option(
        "--only",
        nargs="+",
        choices=list(ROWS),
        help="these stages, in the usual order (all but loop, which takes some minutes more)",
    )
    option("--budget", type=float, default=600.0, help="seconds for all stages (%(default)g)")
    option("--model", help="the demo's model, a folder (default: made from its PyPI wheel)")
    option("--out", type=Path, default=ROOT / "runs" / "gpu-check", help="folder (%(default)s)")
    option("--deliver", type=Path, help="folder for table.md and check.tgz, after every stage")
    option("--threads", type=int, default=os.cpu_count() or 2, help="CPU threads (%(default)s)")
    options = parser.parse_args(arguments)
    if options.budget <= 0:
        parser.error(f"--budget {options.budget:g}: must be above 0")
    require_at_least(parser, options, threads=1)
    if options.device == "cpu" and not options.rehearse:
        parser.error("--device cpu would take hours at the 3B shape; add --rehearse")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    start = time.monotonic()
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"error: torch {torch.__version__} sees no GPU here (nvidia-smi shows whether there is "
            "one). Nothing was measured. --device cpu --rehearse runs the stages at toy size.",
            file=sys.stderr,
        )
        return 1
    out: Path = options.out.resolve()
    try:
        fresh_folder(out, ("table.md", "figures/**", "logs/**", "demo/**", "loop/**"))
        for folder in (out / "figures", out / "logs", *filter(None, [options.deliver])):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    wanted = options.only or [name for name in ROWS if name not in _ASKED_FOR]
    model, problem = options.model, ""
    needing = {"demo", "loop"} | (set() if options.rehearse else {"differences"})
    if model is None and needing.intersection(wanted):
        try:
            model = demo_model()
        except ConfigError as error:
            problem = str(error)
    setup = Setup(options.device, out, model, options.rehearse, options.threads, problem)
    chosen = [stage for stage in stages(setup) if stage.name in wanted]
    try:
        left = options.budget - (time.monotonic() - start)
        good = run(setup, chosen, left, heading(setup), options.deliver)
    except KeyboardInterrupt:
        print(f"\nstopped; figures so far: {out / 'table.md'}", flush=True)
        return 130
    table = out / "table.md"
    say(f"\n{table.read_text()}")
    say(f"this table: {table}; figures and logs: {out}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
