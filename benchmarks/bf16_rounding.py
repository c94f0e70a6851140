"""Can a wrong server be told from one that only rounds? Figures for ``distill/rounding.py``.

    python benchmarks/bf16_rounding.py                        # SmolLM2-135M, the demo's recipe
    python benchmarks/bf16_rounding.py --steps 4 --prompts 8  # a look
    python benchmarks/bf16_rounding.py --device cuda --model owner/name --prompts 32 --response 128

Trains a cartridge as the demo does (rollouts by the embedded server's engine, teacher, loss, AdamW,
a rate that falls along a cosine), in one process and without veRL. Every step of the healthy server
goes through the check that the training engine uses. Every ``--every`` steps other servers are
planted, each with rollouts of its own, and the same check is asked:

    one version back           the cartridge before the last optimizer step
    a tenth of a step back     the same at a tenth of the rate
    half of them one back      two replicas, one behind
    another cartridge          that of the same document read backwards
    another base               every weight times 1 + 0.02 * noise

The servers at fault from the start are judged at step 0, too, when nothing is known but the
trainer's own rounding. A server that is behind and was not refused stays behind for the next steps:
within the rounding the evidence takes several. Ends with status 1 when a healthy step is refused,
or another cartridge or base is let through.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.arguments import require_at_least  # noqa: E402
from benchmarks.planted_servers import (  # noqa: E402
    BACK,
    BASE,
    CARTRIDGE,
    HALF,
    TENTH,
    Experiment,
    World,
)
from cartridge_distill.data.command import DEFAULT_DATA  # noqa: E402
from cartridge_distill.data.document_store import DocumentStore  # noqa: E402
from cartridge_distill.model.loading import load_model  # noqa: E402
from cartridge_distill.model.prompts import render_document, render_prompt  # noqa: E402
from cartridge_distill.util.errors import CartridgeDistillError  # noqa: E402
from cartridge_distill.util.processes import say  # noqa: E402


def demo_world(options: argparse.Namespace) -> World:
    """The demo's model, record and prompts."""
    from cartridge_distill.data.command import main as prepare
    from cartridge_distill.model.demo_model import cache_dir, get_demo_model

    folder = Path(options.model or get_demo_model(cache_dir()))
    data = Path(options.data)
    if not (data / "train.parquet").is_file():
        rows = str(options.steps * options.prompts)
        typed = ["--data", str(DEFAULT_DATA), "--tokenizer", str(folder)]
        prepare([*typed, "--out", str(data), "--rows", rows])
    import pandas

    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = DocumentStore.from_file(str(data / "documents.jsonl"))
    table = pandas.read_parquet(data / "train.parquet")
    needed = min(len(table), options.steps * options.prompts)
    prompts = [render_prompt(tokenizer, list(messages)) for messages in table["prompt"][:needed]]
    return World(
        model=load_model(folder, getattr(torch, options.dtype), options.device),
        prompts=prompts,
        document=render_document(tokenizer, documents.text(documents.ids[0])),
        tokens=options.tokens,
        response=options.response,
        rate=options.lr,
        seed=options.seed,
    )


def table(experiment: Experiment) -> None:
    say(f"\n   {'server':<26}{'refused':>10}{'scaled mean':>16}{'largest':>14}{'coefficient':>18}")
    for name, found in experiment.outcomes.items():

        def span(values: list[float], digits: int) -> str:
            if not values:
                return "-"
            return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

        refused = f"{found.count}/{len(found.refused)}" if found.refused else "-"
        say(
            f"   {name:<26}{refused:>10}{span(found.means, 3):>16}"
            f"{span(found.largest, 2):>14}{span(found.coefficients, 2):>18}"
        )
    total = sum(experiment.seconds.values())
    say("\n   seconds, all servers together:")
    for stage, seconds in experiment.seconds.items():
        say(f"   {stage:<36}{seconds:>8.1f} {seconds / total:>5.0%}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--model", help="folder or hub id (default: SmolLM2-135M-Instruct)")
    option("--data", default="runs/bf16_rounding/data", help="prepared data; made if missing")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s")
    option("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    option("--steps", type=int, default=36, help="optimizer steps (%(default)s)")
    option("--prompts", type=int, default=48, help="rollouts a step (%(default)s)")
    option("--response", type=int, default=6, help="tokens a rollout (%(default)s)")
    option("--tokens", type=int, default=128, help="cartridge tokens (%(default)s)")
    option("--lr", type=float, default=0.03, help="first step's; it falls to a tenth (%(default)s)")
    option("--every", type=int, default=6, help="steps between planted servers (%(default)s)")
    option("--seed", type=int, default=0, help="of the experiment (%(default)s)")
    option("--threads", type=int, help="CPU threads (torch's choice)")
    options = parser.parse_args(arguments)
    require_at_least(parser, options, steps=1, prompts=1, response=1, every=1)
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        experiment = Experiment(demo_world(options), options.steps, options.prompts)
    except (CartridgeDistillError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    start = time.monotonic()
    for step in range(options.steps):
        last = step == options.steps - 1
        due = step % options.every == 1 % options.every or last
        planted = [BACK, TENTH, HALF, CARTRIDGE, BASE] if due else []
        if step == 0:
            planted = [CARTRIDGE, BASE]
        planted += [name for name in experiment.undecided if name not in planted]
        loss = experiment.train(planted)
        healthy = experiment.outcomes["healthy"]
        left = (time.monotonic() - start) / (step + 1) * (options.steps - step - 1)
        told = f", coefficient {healthy.coefficients[-1]:.2f}" if healthy.coefficients else ""
        caught = [
            f"{name}: {'refused' if experiment.outcomes[name].refused[-1] else 'NOT refused'}"
            for name in planted
            if experiment.outcomes[name].refused
        ]
        say(
            f"   step {step + 1}/{options.steps}  loss {loss:.3f}  healthy: scaled mean "
            f"{healthy.means[-1]:.3f}, largest {healthy.largest[-1]:.2f}{told}"
            f"  {'; '.join(caught)}  ({left:.0f} s left)"
        )
    table(experiment)
    outcomes = experiment.outcomes
    missed = [
        name for name in (CARTRIDGE, BASE) if outcomes[name].count < len(outcomes[name].refused)
    ]
    if outcomes["healthy"].count or missed:
        say(f"\n   FAILED: {outcomes['healthy'].count} healthy steps refused, missed: {missed}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
