"""Log-probs of given tokens, in float32, at a temperature."""

from __future__ import annotations

import torch
from torch import Tensor


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits in float32, divided by a temperature; at 1 no copy is made of what is float32."""
    return logits.float() if temperature == 1.0 else logits.float() / temperature


ROWS_AT_ONCE = 512
"""Rows of ``[N, V]`` logits worked on at once: bounds their float32 copies."""

CPU_NUMBERS = 2**20
"""Numbers of them on a CPU: 4 MiB in float32. Several passes go over the same rows, and what stays
in the cache between them costs a third of what comes from memory."""


def rows_at_once(logits: Tensor) -> int:
    """How many rows of ``[N, V]`` logits are worked on at once, at least one."""
    if logits.device.type != "cpu":
        return ROWS_AT_ONCE
    return min(ROWS_AT_ONCE, max(1, CPU_NUMBERS // logits.shape[-1]))


def log_total(rows: Tensor) -> Tensor:
    """``[N, 1]`` logsumexp of each row; -inf where all of a row is, NaN where NaN or inf is in it.

    torch's own takes its exponentials one by one on a CPU, ``log_softmax`` several at once.
    """
    most = rows.amax(dim=-1, keepdim=True)
    found = most - torch.log_softmax(rows, dim=-1).amax(dim=-1, keepdim=True)
    return torch.where(torch.isneginf(most), most, found)


def chosen_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs of given tokens, in float32.

    Args:
        logits: ``[N, V]``.
        token_ids: ``[N]``.
        temperature: logits are divided by it first; 0 (greedy) leaves them alone, as a server does.
    """
    found = []
    count = rows_at_once(logits)
    for rows, ids in zip(logits.split(count), token_ids.split(count), strict=True):
        logprobs = torch.log_softmax(tempered(rows, temperature or 1.0), dim=-1)
        found.append(torch.gather(logprobs, 1, ids[:, None])[:, 0])
    return torch.cat(found)
