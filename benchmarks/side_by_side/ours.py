"""This project's way: steps of the plain loop of ``training/study``, with CPU-seconds by stage.

It runs first. What it draws, the others train on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.side_by_side.cases import DEMO_PROMPT, DEMO_SEED, Case, Sizes
from benchmarks.side_by_side.plain import StageCpu
from benchmarks.side_by_side.work import Batch, Work
from cartridge_distill.cartridge.formats.peft import prompt_embeddings
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.model.logprobs import chosen_logprobs
from cartridge_distill.model.prompts import render_document
from training.study.loop import PlainLoop, samples_of
from training.study.rollouts import Rollouts, Written
from training.study.settings import CartridgeSettings, RunSettings
from verl_patches.actor.device import StageSeconds
from verl_patches.actor.forwards import Scored, score
from verl_patches.actor.samples import Samples

LR = 0.03  # the demo's
TEMPERATURE = 0.7
_STAGE = {"student_forward": "student", "teacher_forward": "teacher", "loss": "update"}


class _Stages(StageSeconds):
    """The loop's own stages, as CPU-seconds under the benchmark's names."""

    def __init__(self, cpu: StageCpu) -> None:
        super().__init__()
        self._cpu = cpu

    def __call__(self, stage: str) -> Any:
        return self._cpu(_STAGE.get(stage, "update"))


class _Endless(Rollouts):
    """No token ends an answer: all ways draw the same number."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._ends = frozenset()


class TimedLoop(PlainLoop):
    """The plain loop, a step at a time, with what the others need to know of it."""

    def __init__(
        self, model: Any, tokenizer: Any, name: str, data: Path, settings: RunSettings
    ) -> None:
        super().__init__(model, tokenizer, name, data, settings)
        self.cpu = StageCpu()
        self._stage = _Stages(self.cpu)
        self._rollouts = _Endless(model, tokenizer, name, self.teacher, settings)

    def rollout(self) -> list[Written]:
        """The next batch's answers, by the cartridge as it stands."""
        prompts = [self._prompts[place] for place in next(self._order)]
        epoch = self.step // self._steps_per_epoch
        with torch.no_grad():
            prefix = self.cartridge.prefix()
        plan = [True] * len(prompts)
        return self._rollouts.write(prompts, plan, epoch, self.step, prefix)

    def scored(self, samples: Samples) -> Scored:
        """Log-probs and losses of a batch, without a step."""
        return score(
            *(samples, self.module, self.cartridge.prefix(), self.teacher, self.settings),
            *(self.token_loss, StageSeconds()),
        )

    def update(self, samples: Samples) -> dict[str, float]:
        """The rest of a step."""
        return self._update(samples)


@dataclass
class Ours:
    """What the loop gave.

    Attributes:
        work: for the others.
        steps: CPU-seconds by stage, one entry a timed step.
        reading: CPU-seconds of reading the document once.
        own: largest difference between the log-probs of rollouts and of the student's forward.
        notes: what has to be known to read the figures.
    """

    work: Work
    steps: list[dict[str, float]] = field(default_factory=list)
    reading: float = 0.0
    own: float = 0.0
    notes: list[str] = field(default_factory=list)


def run(model: Any, tokenizer: Any, name: str, data: Path, case: Case, sizes: Sizes) -> Ours:
    """A step that is compared, then those that are timed.

    Args:
        model: from ``load_model``, with its own or with torch's linear layers; its context is
            widened where the document needs it.
        name: the model's folder.
        data: of the case.

    Raises:
        OffPolicyError: rollouts and student disagree.
    """
    notes = []
    store = DocumentStore.from_file(data / "documents.jsonl")
    document = render_document(tokenizer, store.text(store.ids[0]))
    context = len(document) + DEMO_PROMPT + case.answer
    if context > model.config.max_position_embeddings:
        model.config.max_position_embeddings = context
        notes.append("the document is longer than the model was made for: time, and no sense")
    is_random = len(document) < case.cartridge
    if is_random:
        notes.append("the cartridge is longer than the document: it begins at random")
    loop = TimedLoop(model, tokenizer, name, data, _settings(case, sizes.rollouts, is_random))
    table = prompt_embeddings(Snapshot.take(loop.cartridge.state_dict(), torch.float32)).clone()

    start = time.process_time()
    loop.teacher.prefix(store.ids[0])
    reading = time.process_time() - start

    written = loop.rollout()
    samples = samples_of(written, TEMPERATURE)
    with torch.no_grad():
        scored = loop.scored(samples)
        logprobs = chosen_logprobs(scored.logits, scored.tokens)
    first = loop.update(samples)

    batches, steps, losses = [_batch(written)], [], []
    own = first["logprob_diff/max"]
    for _ in range(sizes.repeats):
        loop.cpu.take("update")
        with loop.cpu("rollout"):
            written = loop.rollout()
        numbers = loop.update(samples_of(written, TEMPERATURE))
        steps.append(loop.cpu.take("update"))
        losses.append(numbers["loss"])
        own = max(own, numbers["logprob_diff/max"])
        batches.append(_batch(written))
    work = Work(
        model=name,
        context=context,
        document=document,
        batches=batches,
        answer_tokens=case.answer,
        temperature=TEMPERATURE,
        topk=loop.settings.topk,
        lr=loop.settings.lr,
        clip=loop.run_settings.optim.clip_grad,
        num_frozen=loop.settings.num_frozen_tokens,
        grad_norm=first["grad_norm"],
        losses=losses,
        reread=sizes.reread,
        table_PE=table,
        logprobs=logprobs,
        token_losses=scored.token_loss,
    )
    return Ours(work, steps, reading, own, notes)


def _batch(written: Sequence[Written]) -> Batch:
    return Batch(
        [list(each.prompt.ids) for each in written],
        [list(each.answer.token_ids) for each in written],
    )


def _settings(case: Case, rollouts: int, is_random: bool) -> RunSettings:
    init = "random" if is_random else "text"
    return RunSettings(
        CartridgeSettings(num_tokens=case.cartridge, lr=LR, init=init),
        seed=DEMO_SEED,
        batch=rollouts,
        response_tokens=case.answer,
        temperature=TEMPERATURE,
    )
