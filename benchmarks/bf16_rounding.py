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
import copy
import math
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.arguments import require_at_least  # noqa: E402
from cartridge_distill.cartridge.prefix import Prefix  # noqa: E402
from cartridge_distill.data.document_store import DocumentStore  # noqa: E402
from cartridge_distill.distill.loss import get_loss  # noqa: E402
from cartridge_distill.distill.rounding import scaled  # noqa: E402
from cartridge_distill.distill.teacher import Teacher, not_finite  # noqa: E402
from cartridge_distill.model.float32_forward import float32_logprobs  # noqa: E402
from cartridge_distill.model.forward import packed_forward  # noqa: E402
from cartridge_distill.model.loading import load_model  # noqa: E402
from cartridge_distill.model.logprobs import chosen_logprobs  # noqa: E402
from cartridge_distill.model.packing import pack  # noqa: E402
from cartridge_distill.model.prefill import cartridge_from_text  # noqa: E402
from cartridge_distill.model.prompts import render_document, render_prompt  # noqa: E402
from cartridge_distill.server.engine import Engine  # noqa: E402
from cartridge_distill.server.rows import Row  # noqa: E402
from cartridge_distill.server.settings import ServerSettings  # noqa: E402
from cartridge_distill.util.errors import CartridgeDistillError, OffPolicyError  # noqa: E402
from verl_patches.actor.device import fetch  # noqa: E402
from verl_patches.actor.logprob_check import RoundingCheck  # noqa: E402

TEMPERATURE, TOPK, FLOOR = 0.7, 20, 0.1
DOCUMENT = "document"
BACK, TENTH, HALF = "one version back", "a tenth of a step back", "half of them one back"
CARTRIDGE, BASE = "another cartridge", "another base"
REPEAT = "the server's own repeat"


def say(line: str) -> None:
    print(line, flush=True)


@dataclass
class World:
    """What an experiment needs: a frozen model, prompts, and the document's ids.

    Attributes:
        model: the trainer's, prepared; the servers take copies.
        prompts: ids that follow a cartridge, in order of use; gone through again when used up.
        document: ids that the teacher reads and the cartridge starts from.
    """

    model: PreTrainedModel
    prompts: list[list[int]]
    document: list[int]
    tokens: int = 128
    response: int = 6
    rate: float = 0.03
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = next(self.model.parameters()).dtype
        return found

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self.model.parameters()).device
        return found


@dataclass
class Rollouts:
    """B sequences with masks of their responses, and the server's N log-probs."""

    sequences: list[Tensor]
    response_masks: list[Tensor]
    server: Tensor

    def __add__(self, other: Rollouts) -> Rollouts:
        server = torch.cat([self.server, other.server])
        return Rollouts(
            self.sequences + other.sequences, self.response_masks + other.response_masks, server
        )


@dataclass
class Outcome:
    """What one server was found to be, over the steps it was asked at.

    Attributes:
        refused: the message where it was, None where it was not, step by step.
        means: of the scaled differences; largest: of the plain ones.
        coefficients: 0 for this version, 1 for the one before, where that could be told.
    """

    refused: list[str | None] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)
    coefficients: list[float] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(message is not None for message in self.refused)


class Experiment:
    """A training run with a healthy server, beside which others can be planted."""

    def __init__(self, world: World, steps: int, prompts: int) -> None:
        self.world, self.steps, self.batch = world, steps, prompts
        torch.manual_seed(world.seed)
        self.engine = self._engine(copy.deepcopy(world.model))
        self.wrong_engine: Engine | None = None
        ids = world.document
        self.teacher = Teacher(world.model, DocumentStore({DOCUMENT: "text"}), lambda _: ids)
        start = torch.tensor(ids, device=world.device)
        self.cartridge = cartridge_from_text(world.model, start, world.tokens).to(world.device)
        self.optimizer = torch.optim.AdamW(
            self.cartridge.trainable_parameters(), lr=world.rate, weight_decay=0.0
        )
        self.check = RoundingCheck(world.dtype)
        self.previous: Prefix | None = None
        self.step = 0
        self.undecided: dict[str, RoundingCheck] = {}  # of servers that are behind, not refused yet
        self.outcomes: dict[str, Outcome] = defaultdict(Outcome)
        self.seconds: dict[str, float] = defaultdict(float)

    def _engine(self, model: PreTrainedModel) -> Engine:
        return Engine(model, ServerSettings(cartridge_dir=Path("."), model_name="m"))

    def served(self) -> Prefix:
        """The cartridge of this version, as a server gets it."""
        prefix = self.cartridge.prefix(self.world.dtype)
        return Prefix(
            [key.detach().clone() for key in prefix.keys],
            [value.detach().clone() for value in prefix.values],
        )

    def roll_out(
        self, prefix: Prefix, engine: Engine | None = None, rows: slice = slice(None)
    ) -> Rollouts:
        """This step's prompts, or some of them, answered behind a cartridge."""
        start = time.perf_counter()
        world = self.world
        first = self.step * self.batch
        places = range(first, first + self.batch)[rows]
        prompts = [world.prompts[place % len(world.prompts)] for place in places]
        asked = [
            Row(list(ids), world.response, TEMPERATURE, random.Random(place), prefix)
            for place, ids in zip(places, prompts, strict=True)
        ]
        found = (engine or self.engine).run(asked)
        sequences = [
            torch.tensor([*ids, *answer.token_ids], device=world.device)
            for ids, answer in zip(prompts, found, strict=True)
        ]
        response_masks = [
            torch.arange(len(ids), device=world.device) >= len(prompt)
            for ids, prompt in zip(sequences, prompts, strict=True)
        ]
        logprobs = [value for answer in found for value in answer.logprobs]
        self.seconds["rollout"] += time.perf_counter() - start
        return Rollouts(sequences, response_masks, torch.tensor(logprobs, device=world.device))

    def logits(self, prefix: Prefix, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Of the counted tokens ``[N, V]``, and their ids ``[N]``."""
        batch, response_mask = pack(rollouts.sequences), torch.cat(rollouts.response_masks)
        logits = packed_forward(self.world.model, prefix, batch, batch.predicts(response_mask))
        return logits, batch.input_ids[response_mask]

    @torch.no_grad()
    def behind(self, rollouts: Rollouts, prefix: Prefix) -> Tensor:
        """The trainer's log-probs ``[N]`` behind a cartridge."""
        start = time.perf_counter()
        found = chosen_logprobs(*self.logits(prefix, rollouts), TEMPERATURE)
        self.seconds["extra forwards"] += time.perf_counter() - start
        return found

    def exactly(self, rollouts: Rollouts, prefix: Prefix) -> Tensor:
        """The same without rounding."""
        start = time.perf_counter()
        some = rollouts.sequences, rollouts.response_masks
        found = float32_logprobs(self.world.model, prefix, *some, TEMPERATURE, self.world.dtype)
        self.seconds["extra forwards in float32"] += time.perf_counter() - start
        return found

    def judge(self, name: str, check: RoundingCheck, rollouts: Rollouts, trainer: Tensor) -> None:
        """Asks the check about one server's rollouts and keeps what it says."""
        check.begin_batch()
        outcome = self.outcomes[name]
        difference = rollouts.server - trainer
        outcome.means.append(scaled(difference, trainer).abs().mean().item())
        outcome.largest.append(difference.abs().max().item())
        everything = torch.ones_like(trainer, dtype=torch.bool)
        try:
            figures = check.student_figures(
                self.step,
                trainer,
                rollouts.server,
                everything,
                self.served(),
                partial(self.behind, rollouts),
                partial(self.exactly, rollouts),
            )
            metrics = check.judge(self.step, fetch(figures))
        except OffPolicyError as error:
            outcome.refused.append(str(error))
            if found := re.search(r"coefficient (\S+) \+-", str(error)):
                outcome.coefficients.append(float(found[1]))
            return
        outcome.refused.append(None)
        if "logprob_diff/stale_coefficient" in metrics:
            outcome.coefficients.append(metrics["logprob_diff/stale_coefficient"])

    def plant(self, name: str) -> None:
        """Another server answers this step's prompts, and the check is asked about it."""
        check = self.undecided.pop(name, None) or copy.deepcopy(self.check)
        now = self.served()
        if name in (BACK, TENTH, HALF):
            if self.previous is None:
                return
            before = between(now, self.previous, 0.1 if name == TENTH else 1.0)
            check.remember(before)
            half = self.batch // 2 if name == HALF else self.batch
            rollouts = self.roll_out(before, rows=slice(0, half))
            if half < self.batch:
                rollouts += self.roll_out(now, rows=slice(half, None))
        elif name == CARTRIDGE:
            backwards = torch.tensor(self.world.document[::-1], device=self.world.device)
            other = cartridge_from_text(self.world.model, backwards, self.cartridge.num_tokens)
            rollouts = self.roll_out(other.prefix(self.world.dtype))
        else:
            self.wrong_engine = self.wrong_engine or self._engine(other_base(self.world.model))
            rollouts = self.roll_out(now, self.wrong_engine)
        self.judge(name, check, rollouts, self.behind(rollouts, now))
        if name in (BACK, TENTH) and self.outcomes[name].refused[-1] is None:
            self.undecided[name] = check

    def repeat(self, rollouts: Rollouts) -> None:
        """The healthy server again, three rows at a time: how closely it repeats itself."""
        now = self.served()
        parts = [
            self.roll_out(now, rows=slice(first, first + 3)) for first in range(0, self.batch, 3)
        ]
        again = sum(parts[1:], parts[0])
        same = [
            torch.equal(one, other)
            for one, other in zip(rollouts.sequences, again.sequences, strict=True)
        ]
        counts = [int(mask.sum()) for mask in rollouts.response_masks]
        pairs = zip(
            same,
            rollouts.server.split(counts),
            again.server.split([int(mask.sum()) for mask in again.response_masks]),
            strict=True,
        )
        kept = [scaled(other - one, one).abs() for equal, one, other in pairs if equal]
        if kept:
            self.outcomes[REPEAT].means.append(torch.cat(kept).mean().item())

    def train(self, planted: Sequence[str] = ()) -> float:
        """One step: the healthy server, those that are planted, loss, AdamW; returns the loss."""
        rate = self.world.rate * cosine(self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rollouts = self.roll_out(self.served())
        start = time.perf_counter()
        logits, tokens = self.logits(self.cartridge.prefix(), rollouts)
        self.seconds["student"] += time.perf_counter() - start
        trainer = chosen_logprobs(logits.detach(), tokens, TEMPERATURE)
        self.judge("healthy", self.check, rollouts, trainer)
        for name in planted:
            self.plant(name)
        if CARTRIDGE in planted:
            self.repeat(rollouts)
        start = time.perf_counter()
        names = [DOCUMENT] * len(rollouts.sequences)
        top = self.teacher.score(rollouts.sequences, rollouts.response_masks, names, TOPK)
        if not top.finite:
            raise not_finite(names)
        loss = get_loss("forward_kl_topk")(logits, top, 1.0).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.cartridge.trainable_parameters(), 1.0)
        self.check.remember(self.cartridge.prefix())
        self.previous = self.served()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds["teacher, loss, backward, optimizer"] += time.perf_counter() - start
        self.step += 1
        return loss.item()


def cosine(step: int, steps: int) -> float:
    """The demo's schedule: from 1 to a tenth."""
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / steps))


def between(now: Prefix, before: Prefix, share: float) -> Prefix:
    """The cartridge that lies a share of the way from this version back to the one before."""

    def mix(one: list[Tensor], other: list[Tensor]) -> list[Tensor]:
        pairs = zip(one, other, strict=True)
        return [(a.float() + share * (b.float() - a.float())).to(a.dtype) for a, b in pairs]

    return Prefix(mix(now.keys, before.keys), mix(now.values, before.values))


@torch.no_grad()
def other_base(model: PreTrainedModel, noise: float = 0.02, seed: int = 1) -> PreTrainedModel:
    """A copy whose weights are each off by some percent, as of a neighbouring checkpoint."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.mul_((1 + noise * drawn).to(parameter.dtype))
    return other


def demo_world(options: argparse.Namespace) -> World:
    """The demo's model, record and prompts."""
    from cartridge_distill.data.command import main as prepare
    from cartridge_distill.model.demo_model import cache_dir, get_demo_model

    folder = Path(options.model or get_demo_model(cache_dir()))
    data = Path(options.data)
    if not (data / "train.parquet").is_file():
        rows = str(options.steps * options.prompts)
        prepare(["--tokenizer", str(folder), "--out", str(data), "--rows", rows])
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
