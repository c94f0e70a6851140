"""The work of a run as a folder: prompts, answers, document, cartridge, and what must come out.

Written by the project's own way, which runs first and draws the answers; read by the children.
Needs torch and safetensors alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

_TENSORS = ("table_PE", "logprobs", "token_losses")
NUMBERS = "work.json"
TENSORS = "work.safetensors"

STAGES = ("rollout", "teacher", "student", "update")
"""Stages of a step. ``update`` is everything that the others are not: loss, backward, optimizer."""


@dataclass(frozen=True)
class Batch:
    """B prompts, and B answers of equal length, as token ids."""

    prompts: list[list[int]]
    answers: list[list[int]]


@dataclass(frozen=True)
class Work:
    """What every way computes.

    Attributes:
        model: folder of the base.
        context: positions that the base is told to allow; the document may need more than it has.
        document: ids, with whatever the model begins with.
        batches: one a step; the first is compared, and is the warm-up.
        answer_tokens: of each answer, whatever the model would rather end.
        temperature: of the rollouts.
        topk: tokens of the teacher that the loss is over, and the tail.
        lr, clip: of AdamW without weight decay, and of the gradient's norm.
        num_frozen: cartridge tokens that do not move.
        grad_norm: of the first batch.
        losses: nats a token, of each timed batch, at the cartridge that it had then.
        reread: samples of a batch that the document is read again for; the rest is calculated.
        table_PE: ``[P, layers * 2 * heads * head_dim]`` the cartridge, as PEFT stores it.
        logprobs, token_losses: ``[N]`` the student's and the loss, of the first batch's answers in
            order.
    """

    model: str
    context: int
    document: list[int]
    batches: list[Batch]
    answer_tokens: int
    temperature: float
    topk: int
    lr: float
    clip: float
    num_frozen: int
    grad_norm: float
    losses: list[float]
    reread: int
    table_PE: Tensor = field(repr=False)
    logprobs: Tensor = field(repr=False)
    token_losses: Tensor = field(repr=False)


def save(work: Work, folder: Path) -> None:
    """Writes the folder's two files."""
    numbers: dict[str, Any] = asdict(work)
    tensors = {name: numbers.pop(name).contiguous() for name in _TENSORS}
    save_file(tensors, folder / TENSORS)
    (folder / NUMBERS).write_text(json.dumps(numbers), encoding="utf-8")


def load(folder: Path) -> Work:
    """Reads it."""
    numbers = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
    numbers["batches"] = [Batch(**batch) for batch in numbers["batches"]]
    return Work(**numbers, **load_file(folder / TENSORS))
