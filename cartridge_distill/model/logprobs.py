"""Log-probs of given tokens, in float32, at a temperature."""

from __future__ import annotations

import torch
from torch import Tensor


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits in float32, divided by a temperature; at 1 no copy is made of what is float32."""
    return logits.float() if temperature == 1.0 else logits.float() / temperature


ROWS_AT_ONCE = 512
"""Rows of ``[N, V]`` logits worked on at once: bounds their float32 copies."""


def chosen_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs of given tokens, in float32.

    Args:
        logits: ``[N, V]``.
        token_ids: ``[N]``.
        temperature: logits are divided by it first; 0 (greedy) leaves them alone, as a server does.
    """
    found = []
    for rows, ids in zip(logits.split(ROWS_AT_ONCE), token_ids.split(ROWS_AT_ONCE), strict=True):
        scaled = tempered(rows, temperature or 1.0)
        chosen = torch.gather(scaled, 1, ids[:, None])[:, 0]
        found.append(chosen - torch.logsumexp(scaled, dim=-1))
    return torch.cat(found)
