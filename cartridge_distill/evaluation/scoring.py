"""The scores that need no sampling: KL to the teacher on its own answers, and option likelihood.

Used by the evaluation of a finished cartridge (``harness``) and during training (``validation``):
one definition, one code path. Everything runs under ``no_grad``, draws no random number and leaves
the model with the attention it came with.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.evaluation.prompts import AskedQuestion
from cartridge_distill.model.attention import ATTENTION_NAME
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.logprobs import chosen_logprobs
from cartridge_distill.model.packing import PackedBatch, pack
from cartridge_distill.server.rows import NewToken
from cartridge_distill.util.errors import CartridgeDistillError


def device_of(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


@dataclass(frozen=True)
class TeacherAnswers:
    """What the model with the whole document says to B prompts.

    Attributes:
        prompts: B lists of ids.
        answers: B lists of 1 to `ANSWER_TOKENS` ids, the likeliest ones, the end token included.
        logprobs: B tensors ``[answer, V]``, float32: the teacher's distribution of each of them.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    logprobs: list[Tensor]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: Any,
        document: Prefix | None,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        ends: frozenset[int],
    ) -> TeacherAnswers:
        answers = greedy_answers(model, [document] * len(prompts), prompts, max_new_tokens, ends)
        logits = response_logits(model, document, prompts, answers)
        logprobs = logits.float().log_softmax(-1)
        return cls(list(prompts), answers, list(logprobs.split([len(ids) for ids in answers])))

    def take(self, members: Sequence[int]) -> TeacherAnswers:
        """Some of them."""
        return TeacherAnswers(
            [self.prompts[i] for i in members],
            [self.answers[i] for i in members],
            [self.logprobs[i] for i in members],
        )

    def to(self, device: torch.device | str) -> TeacherAnswers:
        logprobs = [part.to(device) for part in self.logprobs]
        return TeacherAnswers(self.prompts, self.answers, logprobs)

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self.logprobs)


@torch.no_grad()
def kl_sums(model: Any, prefix: Prefix | None, teacher: TeacherAnswers) -> list[float]:
    """KL(teacher || student) in nats, summed over the tokens of each of B answers.

    The sum over the vocabulary is whole, no top-k: ``sum_v p(v) (log p(v) - log q(v))``.

    Raises:
        CartridgeDistillError: the model's logits are not finite behind this prefix.
    """
    logits = response_logits(model, prefix, teacher.prompts, teacher.answers)
    students = logits.float().log_softmax(-1).split([len(ids) for ids in teacher.answers])
    # Rounding of two equal distributions can end below zero.
    return [
        max(0.0, finite(float((expected.exp() * (expected - student)).sum())))
        for expected, student in zip(teacher.logprobs, students, strict=True)
    ]


def finite(value: float) -> float:
    """The value itself.

    Raises:
        CartridgeDistillError: it is not finite.
    """
    if not math.isfinite(value):
        raise CartridgeDistillError(
            "the model's logits are not finite behind one of the prefixes: the cartridge's "
            "training has diverged, or the model overflows in this dtype; fix: evaluate an earlier "
            "checkpoint or train again with a lower rate, or say --dtype float32"
        )
    return value


def option_scores(
    model: Any, prefix: Prefix | None, asked: Sequence[AskedQuestion]
) -> list[list[float]]:
    """Mean log-prob per token, in nats, of each option of each question."""
    stems = [question.stem for question in asked for _ in question.options]
    texts = [option for question in asked for option in question.options]
    found = iter(continuation_logprobs(model, prefix, stems, texts))
    return [[next(found) for _ in question.options] for question in asked]


def best(scores: Sequence[float]) -> int:
    """The place of the largest score; of equal ones the first."""
    return max(range(len(scores)), key=scores.__getitem__)


def greedy_answers(
    model: Any,
    prefixes: Sequence[Prefix | None],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: frozenset[int] = frozenset(),
) -> list[list[int]]:
    """The most likely next tokens, one by one, for B prompts behind a prefix each.

    Uses the embedded server's engine (ragged rows that share a prefix, with a KV cache) and gives
    the model back with the attention of the packed forward.

    Returns:
        For each prompt 1 to `max_new_tokens` ids, the end token included.
    """
    unused = [random.Random(0) for _ in prompts]
    return sampled_answers(model, prefixes, prompts, max_new_tokens, 0.0, unused, ends)


def sampled_answers(
    model: Any,
    prefixes: Sequence[Prefix | None],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float | Sequence[float],
    generators: Sequence[random.Random],
    ends: frozenset[int] = frozenset(),
    on_token: Callable[[NewToken], None] | None = None,
) -> list[list[int]]:
    """As :func:`greedy_answers`, sampled with each prompt's own random numbers.

    Args:
        temperature: of all, or one a prompt; 0 takes the most likely tokens.
        on_token: called with each new token, of whichever prompt.
    """
    from cartridge_distill.server.engine import Engine
    from cartridge_distill.server.rows import Row
    from cartridge_distill.server.settings import ServerSettings

    temperatures = (
        [temperature] * len(prompts) if isinstance(temperature, int | float) else temperature
    )
    try:
        engine = Engine(model, ServerSettings())
        rows = [
            Row(
                list(prompt),
                max_new_tokens,
                at,
                generator,
                prefix,
                ends,
                on_token=on_token,
            )
            for prefix, prompt, at, generator in zip(
                prefixes, prompts, temperatures, generators, strict=True
            )
        ]
        return [generated.token_ids for generated in engine.run(rows)]
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


@torch.no_grad()
def continuation_logprobs(
    model: Any,
    prefix: Prefix | None,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
) -> list[float]:
    """Mean log-prob per token, in nats, of each continuation of its prompt.

    All in one packed row: what prompts have in common is computed once there, so the options of a
    question cost little more than one of them.

    Args:
        prompts, continuations: as many of each, at least one id in each.
    """
    logits = response_logits(model, prefix, prompts, continuations)
    chosen = torch.tensor([i for ids in continuations for i in ids], device=logits.device)
    logprobs = chosen_logprobs(logits, chosen)
    parts = logprobs.split([len(ids) for ids in continuations])
    return [finite(float(part.mean())) for part in parts]


def response_logits(
    model: Any,
    prefix: Prefix | None,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
) -> Tensor:
    """Logits `[N, V]` that predict the N response tokens, in order."""
    pairs = list(zip(prompts, responses, strict=True))
    response_mask = [
        flag
        for prompt, response in pairs
        for flag in [False] * len(prompt) + [True] * len(response)
    ]
    batch = _pack(model, [[*prompt, *response] for prompt, response in pairs])
    logit_mask = batch.predicts(np.array(response_mask))
    return packed_forward(model, prefix, batch, logit_mask)


def _pack(model: Any, sequences: Sequence[Sequence[int]]) -> PackedBatch:
    return pack([torch.tensor(list(ids), device=device_of(model)) for ids in sequences])
