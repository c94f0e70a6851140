"""What the children share: one thread, padding, plain forwards, the loss, a clock by stage.

Written as a user of transformers would write it, with the treatment that costs a user no effort:
the vocabulary's product runs where an answer is predicted and nowhere else, and micro-batches are
as large as 1 GiB of logits allows.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

LOGIT_BYTES = 2**30
KV_BYTES = 2**31
READ_TOKENS = 8192


@dataclass
class Outcome:
    """What a child says.

    Attributes:
        steps: CPU-seconds by stage, one entry a timed step.
        logprobs: ``[N]`` the student's on the first batch; None where there is no student.
        token_losses: ``[N]`` nats, of the first batch; of its first samples alone where the way
            computes no more.
        grad_norm: of the first batch, before it is cut.
        losses: nats a token, of each timed step, at the cartridge that it had then.
        first: the first answer token's log-probs by the rollout's own forward, of the first batch.
        own: largest difference between rollouts and the way's own student forward.
        reading: CPU-seconds that reading the document once takes.
        started: CPU-seconds from the process' start to the first batch.
        notes: what has to be known to read the figures.
        versions: of the packages.
        failed: why the way cannot run; nothing else holds then.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    logprobs: list[float] | None = None
    token_losses: list[float] | None = None
    grad_norm: float | None = None
    losses: list[float] = field(default_factory=list)
    first: list[float] | None = None
    own: float | None = None
    reading: float | None = None
    started: float = 0.0
    notes: list[str] = field(default_factory=list)
    versions: str = ""
    failed: str | None = None


def versions_of(*names: str) -> str:
    """As the table's foot says them."""
    found = [f"{name} {version(name)}" for name in ("torch", "transformers", *names)]
    return ", ".join([*found, f"Python {platform.python_version()}"])


def say(outcome: Outcome) -> None:
    """The child's last line."""
    sys.stdout.flush()
    print(json.dumps(asdict(outcome)), flush=True)


def one_thread() -> None:
    """CPU-seconds are those of one thread."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


class StageCpu:
    """CPU-seconds of this process, user and system, by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._start = time.process_time()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[stage] += time.process_time() - start

    def take(self, rest: str) -> dict[str, float]:
        """Stages since the last call; what no stage had is called ``rest``."""
        now = time.process_time()
        found = dict(self.seconds)
        found[rest] = now - self._start - sum(found.values())
        self.seconds.clear()
        self._start = now
        return found


def load_base(folder: str, context: int) -> Any:
    """The frozen base in float32, as transformers loads it, with room for the document."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.requires_grad_(False)
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, context)
    return model


def padded_right(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids ``[B, longest]``, and the mask."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    return ids, mask


def padded_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The same with the padding in front, as `generate` wants it."""
    ids, mask = padded_right([list(reversed(row)) for row in rows])
    return ids.flip(1), mask.flip(1)


Forward = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(ids, mask, positions from 0, logits_to_keep) -> logits ``[B, kept, V]``."""


def answer_logits(
    forward: Forward, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Tensor:
    """Logits ``[N, V]`` at the places that predict the answers' tokens; answers of one length.

    Padded on the left, so that the last places of all rows are the answers'; with positions, for
    without them a padded row would stand further from what is before it.
    """
    rows = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    ids, mask = padded_left(rows)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return forward(ids, mask, positions, len(answers[0])).flatten(0, 1)


def rows_at_once(rows: int, answer: int, vocabulary: int, kv_bytes_of_row: int = 0) -> int:
    """Samples of a micro-batch that memory is spent on."""
    by_logits = LOGIT_BYTES // (4 * vocabulary * answer)
    by_kv = KV_BYTES // kv_bytes_of_row if kv_bytes_of_row else by_logits
    return max(1, min(by_logits, by_kv, rows))


@dataclass(frozen=True)
class TopK:
    """The teacher's ``[N, K]`` ids and log-probs, and ``[N]`` the log of the mass beside them."""

    ids: Tensor
    logprobs: Tensor
    tail: Tensor


def _log_of_rest(logprobs: Tensor) -> Tensor:
    """``[N, K]`` -> ``[N]`` log(1 - sum of p), kept away from log 0."""
    mass = logprobs.double().exp().sum(-1)
    return torch.log((1 - mass).clamp_min(1e-12)).float()


def teacher_topk(logits: Tensor, k: int) -> TopK:
    """The k most likely tokens, under the full softmax."""
    top, ids = logits.topk(k, dim=-1)
    logprobs = top - logits.logsumexp(-1, keepdim=True)
    return TopK(ids, logprobs, _log_of_rest(logprobs))


def forward_kl(logits: Tensor, teacher: TopK) -> Tensor:
    """``[N]`` KL(teacher || student) over the teacher's top k and the tail, nats."""
    student = logits.gather(-1, teacher.ids) - logits.logsumexp(-1, keepdim=True)
    tail = _log_of_rest(student)
    inside = (teacher.logprobs.exp() * (teacher.logprobs - student)).sum(-1)
    return inside + teacher.tail.exp() * (teacher.tail - tail)


def chosen(logits: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
    """``[N, V]`` -> ``[N]`` log-probs of the answers' tokens."""
    ids = torch.tensor([token for answer in answers for token in answer])
    return logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)


def read_document(model: Any, document: Sequence[int]) -> DynamicCache:
    """Its keys and values, one row."""
    cache = DynamicCache()
    with torch.no_grad():
        ids = torch.tensor([list(document)])
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def behind(model: Any, kept: Any) -> Forward:
    """A forward behind the keys and values of a cache of one row, which stays as it is."""

    def forward(ids: Tensor, mask: Tensor, positions: Tensor, keep: int) -> Tensor:
        cache = DynamicCache()
        for number, layer in enumerate(kept.layers):
            cache.update(layer.keys, layer.values, number)
        for layer in cache.layers:  # no copy: the forward's own one is enough
            layer.keys = layer.keys.expand(len(ids), -1, -1, -1)
            layer.values = layer.values.expand(len(ids), -1, -1, -1)
        ones = mask.new_ones(len(ids), kept.get_seq_length())
        logits: Tensor = model(
            input_ids=ids,
            attention_mask=torch.cat([ones, mask], 1),
            position_ids=positions + kept.get_seq_length(),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        return logits

    return forward
