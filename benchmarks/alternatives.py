"""A step of training by this project and by what a user would pick instead, on the same work.

    python benchmarks/alternatives.py                         # the demo's step, this environment
    python benchmarks/alternatives.py --make-environment DIR  # the alternatives' own environment
    python benchmarks/alternatives.py --alternatives-python DIR/bin/python
    python benchmarks/alternatives.py --rollouts 12 --documents 600 2400 6000 12000 \\
        --answers 6 64 --cartridges 128 512 1024

CPU-seconds of one thread, user and system, of one process a way; the median of --repeats steps with
the shortest and the longest. The base is SmolLM2-135M-Instruct in float32. The ways:

ours         a step of the plain loop of training/study: no veRL, Ray or HTTP
torch-linear ours with torch's own linear layers, on a CPU where this project's are faster
peft-kept    a plain loop around PEFT's CARTRIDGE; the teacher's document KV is kept
peft-reread  the same, and the document is read again for each sample
trl          TRL's SDFTTrainer with PEFT's CARTRIDGE
generate     transformers' `generate` with the cartridge as its cache; rollouts alone

Ours runs first and draws the answers. The others draw as many tokens of their own, throw them away
and train on ours, so that all compute the same losses. Before a way is reported its log-probs,
loss and gradient are compared with ours; one that disagrees ends the script, but for what is an
alternative's own fault, which is said beside its figures.

Each value of --documents, --answers and --cartridges is a case of its own, beside the demo's step.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.arguments import require_at_least  # noqa: E402
from benchmarks.bases import demo_model, machine  # noqa: E402
from benchmarks.side_by_side import cases, environment, floor, ours, table  # noqa: E402
from benchmarks.side_by_side import work as work_folder  # noqa: E402
from benchmarks.side_by_side.cases import Case, Sizes  # noqa: E402
from benchmarks.side_by_side.ours import Ours  # noqa: E402
from benchmarks.side_by_side.plain import Outcome  # noqa: E402
from benchmarks.side_by_side.table import Row  # noqa: E402
from cartridge_distill.model.frozen_linear import (  # noqa: E402
    onednn_is_faster,
    use_frozen_linear,
    use_torch_linear,
)
from cartridge_distill.model.loading import load_model  # noqa: E402
from cartridge_distill.model.reading import read_tokenizer  # noqa: E402
from cartridge_distill.util.errors import CartridgeDistillError  # noqa: E402
from cartridge_distill.util.processes import say  # noqa: E402

TORCH_LINEAR = "torch-linear"
WAYS = {
    TORCH_LINEAR: "ours, with torch's own linear layers",
    "peft-kept": "PEFT CARTRIDGE, plain loop, document KV kept",
    "peft-reread": "the same, document read again for each sample",
    "trl": "TRL SDFTTrainer with PEFT CARTRIDGE",
    "generate": "transformers' generate, the cartridge as cache",
}
MODULES = {"trl": "trl_trainer"}
OURS = "ours"


class Run:
    """The cases of a command, one after the other.

    Args:
        options: of the command line.
        scratch: for data, work and the children's logs.
    """

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch = options, scratch
        self.python = environment.find(options.alternatives_python)
        self.tokenizer = read_tokenizer(options.model)
        self.demo = cases.demo_data(options.model, scratch / "demo")
        self.sizes = Sizes(options.rollouts, options.repeats, min(options.reread, options.rollouts))

    def case(self, case: Case, number: int) -> list[Row]:
        """One case: ours, the others, the tables; its rows."""
        say(f"\n== {case}; {self.sizes.rollouts} rollouts, load {os.getloadavg()[0]:.1f}")
        folder = self.scratch / f"case{number}"
        folder.mkdir()
        data = cases.data_of(case, self.demo, self.tokenizer, folder / "data")
        model: Any = load_model(self.options.model)
        given = self.tokenizer, self.options.model, data, case, self.sizes
        found = ours.run(model, *given)
        self._say_notes(found.notes)
        say(f"   ours: rollout against the student's forward {found.own:.1e} in log-probs")
        work_folder.save(found.work, folder)
        say(f"   the document has {len(found.work.document):,} tokens")
        rows = [Row(OURS, found.steps)]
        if onednn_is_faster() and TORCH_LINEAR in self.options.only:
            use_torch_linear(model)
            rows.append(Row(WAYS[TORCH_LINEAR], ours.run(model, *given).steps))
            use_frozen_linear(model)
        asked = {name: self._other(name, folder, found) for name in self._asked()}
        outcomes = {name: outcome for name, outcome in asked.items() if outcome is not None}
        rows += rows_of(outcomes)
        self._report(found, rows, outcomes)
        self._say_floor(model, found)
        return rows

    def _asked(self) -> list[str]:
        """Ways that run in a child."""
        return [name for name in WAYS if name in self.options.only and name != TORCH_LINEAR]

    def _other(self, name: str, folder: Path, found: Ours) -> Outcome | None:
        """A child's result; None for a way that cannot run, which is said."""
        module = MODULES.get(name, "peft_loop")
        outcome = environment.run(self.python, module, folder, name, folder / f"{name}.log")
        if outcome.failed is not None:
            say(f"   {name} cannot run: {outcome.failed}")
            return None
        if name == "trl":
            say(f"   trl: {table.of_padding(outcome, found.work)}")
            say(f"   trl: {table.differences(outcome, found.work)}")
        else:
            say(f"   {name} agrees: {table.agreement(name, outcome, found.work)}")
        say(f"   {name}: {outcome.versions}; {outcome.started:.1f} CPU-s until its first batch")
        self._say_notes(outcome.notes)
        return outcome

    @staticmethod
    def _say_notes(notes: list[str]) -> None:
        for note in notes:
            say(f"   note: {note}")

    def _report(self, found: Ours, rows: list[Row], outcomes: dict[str, Outcome]) -> None:
        losses = {name: outcome.losses for name, outcome in outcomes.items() if outcome.losses}
        say("\n" + table.markdown(rows))
        reading = {OURS: found.reading}
        reading |= {name: o.reading for name, o in outcomes.items() if o.reading is not None}
        said = ", ".join(f"{name} {seconds:.2f}" for name, seconds in reading.items())
        say(f"\nreading the document once, not in the table: {said}")
        say("\n" + table.losses_table(found.work.losses, losses))

    def _say_floor(self, model: Any, found: Ours) -> None:
        shape, rate = floor.Shape.of(model), floor.product_rate()
        batches = found.work.batches[1:]

        def mean(once: bool) -> dict[str, float]:
            each = [floor.flops(shape, found.work, batch, once) for batch in batches]
            return {stage: sum(one[stage] for one in each) / len(each) for stage in each[0]}

        alone, shared = mean(False), mean(True)
        say("\n" + table.floor_table(Row(OURS, found.steps), alone, shared, rate))


def rows_of(outcomes: dict[str, Outcome]) -> list[Row]:
    """The others' rows. What reads the document again has its rest from the loop that does not."""
    rows = []
    for name, outcome in outcomes.items():
        if name == "peft-reread" and "peft-kept" in outcomes:
            kept = Row("", outcomes["peft-kept"].steps)
            rows.append(table.with_reading(kept, WAYS[name], outcome.steps))
        else:
            partial = name in ("generate", "peft-reread")
            rows.append(Row(WAYS[name], outcome.steps, partial))
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--model", help="folder of the base (default: SmolLM2-135M-Instruct)")
    option("--documents", type=int, nargs="+", default=[], metavar="N", help="tokens")
    option("--answers", type=int, nargs="+", default=[], metavar="N", help="tokens")
    option("--cartridges", type=int, nargs="+", default=[], metavar="N", help="tokens")
    option("--rollouts", type=int, default=cases.DEMO_BATCH, help="a step (%(default)s)")
    option("--repeats", type=int, default=3, help="timed steps (%(default)s)")
    option("--only", nargs="+", choices=list(WAYS), default=list(WAYS), help="of the others (all)")
    option(
        "--reread",
        type=int,
        default=12,
        metavar="N",
        help="samples that peft-reread reads the document for; multiplied (%(default)s)",
    )
    option("--alternatives-python", type=Path, metavar="PATH", help="of their environment (this)")
    option("--make-environment", type=Path, metavar="DIR", help="makes it there, and ends")
    options = parser.parse_args(arguments)
    require_at_least(parser, options, rollouts=1, repeats=1, reread=1)
    for name in ("documents", "answers", "cartridges"):
        least = 2 if name == "cartridges" else 1
        for value in getattr(options, name):
            if value < least:
                parser.error(f"--{name} {value}: must be at least {least}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(arguments)
    torch.set_num_threads(1)
    start = time.monotonic()
    try:
        if options.make_environment is not None:
            say(f"made: {environment.make(options.make_environment)}")
            return 0
        options.model = options.model or demo_model()
        say(f"machine: {machine('cpu')}; torch {torch.__version__}, {platform.python_version()}")
        say(f"load:    {os.getloadavg()[0]:.1f} over the last minute")
        wanted = cases.cases_of(options.documents, options.answers, options.cartridges)
        with tempfile.TemporaryDirectory(prefix="alternatives-") as scratch:
            run = Run(options, Path(scratch))
            done = [(str(case), run.case(case, number)) for number, case in enumerate(wanted)]
        if len(done) > 1:
            say("\n" + table.growth(done))
    except (CartridgeDistillError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    say(f"\nload {os.getloadavg()[0]:.1f} at the end; {time.monotonic() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
