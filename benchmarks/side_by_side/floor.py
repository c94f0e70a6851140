"""What the work needs at least: its products, over the rate at which one thread multiplies.

FLOPs of a forward over T tokens, V rows of which go through the vocabulary's product:

    2 x (weights of the layers' linear maps) x T  +  2 x hidden x vocabulary x V
    +  4 x layers x heads x head_dim x (tokens seen, summed over the T)

A backward needs as many again for its linear maps (frozen weights get no gradient) and twice as
many for attention. Norms, rotary embeddings, softmax and reading of memory are not in it, so no way
can reach it. Tokens are counted twice over: each sample's own, and each distinct beginning once,
which is what a way that shares beginnings computes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.side_by_side.work import Batch, Work
from cartridge_distill.model.frozen_linear import FrozenLinear, onednn_is_faster

_SIZE = 1024


@dataclass(frozen=True)
class Shape:
    """Numbers of a decoder.

    Attributes:
        linear: weights of the layers' linear maps.
        head: of the vocabulary's product.
        attention: layers x heads x head_dim.
    """

    linear: int
    head: int
    attention: int

    @classmethod
    def of(cls, model: Any) -> Shape:
        """Of a transformers decoder."""
        config, head = model.config, model.get_output_embeddings()
        maps = [
            each for each in model.modules() if isinstance(each, nn.Linear) and each is not head
        ]
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            linear=sum(each.weight.numel() for each in maps),
            head=head.weight.numel(),
            attention=config.num_hidden_layers * config.num_attention_heads * size,
        )

    def forward(self, tokens: int, rows: int, seen: int) -> float:
        """FLOPs; ``seen`` is the sum over the tokens of what each attends to, itself included."""
        return 2.0 * self.linear * tokens + 2.0 * self.head * rows + 4.0 * self.attention * seen

    def backward(self, tokens: int, rows: int, seen: int) -> float:
        """FLOPs of the gradient for the cartridge."""
        return 2.0 * self.linear * tokens + 2.0 * self.head * rows + 8.0 * self.attention * seen


def _counted(rows: Sequence[Sequence[int]], before: int, shared: bool) -> tuple[int, int]:
    """Tokens to compute, and what they see, behind so many that are kept."""
    if not shared:
        return sum(map(len, rows)), sum(n * before + n * (n + 1) // 2 for n in map(len, rows))
    seen = {tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)}
    return len(seen), sum(before + len(beginning) for beginning in seen)


def flops(shape: Shape, work: Work, batch: Batch, shared: bool) -> dict[str, float]:
    """FLOPs of a step by stage; the document is read and kept.

    Args:
        shared: each distinct beginning once, else each sample by itself.
    """
    answers = len(batch.answers) * work.answer_tokens
    whole = [[*prompt, *answer[:-1]] for prompt, answer in zip(*_of(batch), strict=True)]
    prompts, seen_by_prompts = _counted(batch.prompts, len(work.table_PE), shared)
    # Each sample decodes by itself, also a token that another one drew.
    alone, seen_alone = _counted(whole, len(work.table_PE), False)
    before, seen_before = _counted(batch.prompts, len(work.table_PE), False)
    rollout = prompts + alone - before, answers, seen_by_prompts + seen_alone - seen_before
    student = _counted(whole, len(work.table_PE), shared)
    teacher = _counted(whole, len(work.document), shared)
    return {
        "rollout": shape.forward(*rollout),
        "teacher": shape.forward(teacher[0], answers, teacher[1]),
        "student": shape.forward(student[0], answers, student[1]),
        "update": shape.backward(student[0], answers, student[1]),
    }


def _of(batch: Batch) -> tuple[list[list[int]], list[list[int]]]:
    return batch.prompts, batch.answers


def product_rate(tries: int = 7) -> float:
    """FLOP/s of one thread in a float32 product of 1,024 x 1,024, by whichever way is faster here.

    The median of some tries, in CPU-seconds: what other processes take is not in it, but a core's
    clock and cache that they share are.
    """
    rows = torch.randn(_SIZE, _SIZE)
    maps: list[nn.Module] = [nn.Linear(_SIZE, _SIZE, bias=False)]
    if onednn_is_faster():
        maps.append(FrozenLinear(_SIZE, _SIZE, bias=False))
    rates = []
    with torch.no_grad():
        for each in maps:
            each.requires_grad_(False)
            each(rows)
            seconds = []
            for _ in range(tries):
                start = time.process_time()
                for _ in range(4):
                    each(rows)
                seconds.append((time.process_time() - start) / 4)
            rates.append(2.0 * _SIZE**3 / statistics.median(seconds))
    return max(rates)
