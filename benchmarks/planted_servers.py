"""A training run in one process, with a healthy server; wrong servers can be planted beside it.

Every server's rollouts go through the check that the training engine uses. The run is kept apart
from the command that reports about it, ``bf16_rounding.py``.
"""

from __future__ import annotations

import copy
import math
import random
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.distill.loss import get_loss
from cartridge_distill.distill.rounding import scaled
from cartridge_distill.distill.teacher import Teacher, not_finite
from cartridge_distill.model.beginning import first_cartridge
from cartridge_distill.model.float32_forward import float32_logprobs
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.logprobs import chosen_logprobs
from cartridge_distill.model.packing import pack
from cartridge_distill.server.engine import Engine
from cartridge_distill.server.rows import Row
from cartridge_distill.server.settings import ServerSettings
from cartridge_distill.util.errors import OffPolicyError
from verl_patches.actor.device import fetch
from verl_patches.actor.logprob_check import OfStudent, RoundingCheck, VersionPair

TEMPERATURE, TOPK, FLOOR = 0.7, 20, 0.1
DOCUMENT = "document"
BACK, TENTH, HALF = "one version back", "a tenth of a step back", "half of them one back"
CARTRIDGE, BASE = "another cartridge", "another base"
REPEAT = "the server's own repeat"


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
        self.cartridge = first_cartridge(world.model, start, world.tokens).to(world.device)
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

    def judge(
        self,
        name: str,
        check: RoundingCheck,
        rollouts: Rollouts,
        trainer: Tensor,
        before: Prefix | None,
    ) -> None:
        """Asks the check about one server's rollouts and keeps what it says.

        Args:
            before: the version that the current one is told from; None where there is none.
        """
        check.begin_batch()
        outcome = self.outcomes[name]
        difference = rollouts.server - trainer
        outcome.means.append(scaled(difference, trainer).abs().mean().item())
        outcome.largest.append(difference.abs().max().item())
        everything = torch.ones_like(trainer, dtype=torch.bool)
        now = self.served()
        pair = None if before is None else VersionPair(self.step, now, before, everything)
        try:
            figures = check.student_figures(
                self.step,
                OfStudent(trainer, trainer, rollouts.server, everything),
                lambda: pair,
                now,
                partial(self.behind, rollouts),
                partial(self.exactly, rollouts),
            )
            metrics = check.judge(fetch(figures))
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
        now, before = self.served(), self.previous
        if name in (BACK, TENTH, HALF):
            if self.previous is None:
                return
            before = between(now, self.previous, 0.1 if name == TENTH else 1.0)
            half = self.batch // 2 if name == HALF else self.batch
            rollouts = self.roll_out(before, rows=slice(0, half))
            if half < self.batch:
                rollouts += self.roll_out(now, rows=slice(half, None))
        elif name == CARTRIDGE:
            backwards = torch.tensor(self.world.document[::-1], device=self.world.device)
            other = first_cartridge(self.world.model, backwards, self.cartridge.num_tokens)
            rollouts = self.roll_out(other.prefix(self.world.dtype))
        else:
            self.wrong_engine = self.wrong_engine or self._engine(other_base(self.world.model))
            rollouts = self.roll_out(now, self.wrong_engine)
        self.judge(name, check, rollouts, self.behind(rollouts, now), before)
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
        self.judge("healthy", self.check, rollouts, trainer, self.previous)
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
