"""The tokens of a document that are looked at most, by each head for itself, as a cartridge.

The document's own keys and values are the best cartridge there is, but for their number. Here the
document is read once, and once more behind itself: what the second reading looks at in order to
repeat the first is what the document's keys are for, whatever is asked later (KVzip, arXiv
2505.23416, scores the keys of a cache so). Every kv head keeps the P tokens that any token of the
second reading, by any of its query heads, gave the most weight. They keep their order and move up
to positions 0..P-1 (:mod:`cartridge_distill.model.turning`). The frozen tokens stay the document's
first ones: the attention sink.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from cartridge_distill.cartridge.kv_shape import text_config
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.model.forward import run_packed
from cartridge_distill.model.packing import pack
from cartridge_distill.model.prefill import prefix_from_tokens
from cartridge_distill.model.scoring import Scoring
from cartridge_distill.model.turning import Turner
from cartridge_distill.util.errors import ConfigError

AGAIN = 512
"""Tokens of the second reading at once, each part right behind the document."""

LEAST_AGAIN = 32
"""Fewer left in the model's context would take a forward for every few tokens."""

_SCORE_BUDGET = 32 * 1024 * 1024  # scores held at once


@torch.no_grad()
def attended_prefix(
    model: nn.Module,
    input_ids: Tensor,
    num_tokens: int,
    num_frozen_tokens: int = 1,
    document: Prefix | None = None,
) -> Prefix:
    """The keys and values of a document that it needs to be repeated.

    Args:
        model: from :func:`cartridge_distill.model.loading.load_model`.
        input_ids: ``[N]`` ids of the document, N at least ``num_tokens``.
        num_tokens: P of the prefix.
        num_frozen_tokens: the first so many tokens are kept by every head.
        document: the document's KV, where it has been computed.

    Raises:
        ConfigError: the document fills the model's context, or its keys cannot be moved.
    """
    turner = Turner.of(model)
    if document is None:
        document = prefix_from_tokens(model, input_ids)
    weights = attention_received(model, document, input_ids)
    keys, values = [], []
    for layer, received in enumerate(weights):
        received[:, :num_frozen_tokens] = math.inf
        # Of equal ones the first: what topk takes is not said.
        order = received.sort(dim=-1, descending=True, stable=True).indices
        chosen = order[:, :num_tokens].sort(dim=-1).values  # [H, P]
        by = torch.arange(num_tokens, device=chosen.device) - chosen
        rows = chosen[..., None].expand(-1, -1, document.keys[layer].shape[-1])
        keys.append(turner.turn(layer, document.keys[layer][0].gather(1, rows), by)[None])
        values.append(document.values[layer][0].gather(1, rows)[None])
    return Prefix(keys, values)


@torch.no_grad()
def attention_received(model: nn.Module, document: Prefix, input_ids: Tensor) -> list[Tensor]:
    """What a second reading of a document looks at in the first.

    Args:
        document: the KV of ``input_ids``.
        input_ids: ``[N]``.

    Returns:
        For each layer that has keys of its own ``[H, N]`` float32: the largest weight that a token
        of the second reading gives, over its query heads and over all layers that see these keys.

    Raises:
        ConfigError: the document fills the model's context.
    """
    read = document.num_tokens
    context = getattr(text_config(model.config), "max_position_embeddings", None)
    at_once = AGAIN if context is None else min(AGAIN, context - read)
    if at_once < min(LEAST_AGAIN, read):
        raise ConfigError(
            f"the document has {read} tokens and the model a context of {context}: it cannot be "
            "read again behind itself; fix: set actor.cartridge.init=text, or split the document"
        )
    received = [
        torch.zeros(key.shape[1], read, dtype=torch.float32, device=key.device)
        for key in document.keys
    ]

    def note(layer: int, query: Tensor, key: Tensor, past_key: Tensor, scoring: Scoring) -> None:
        torch.maximum(received[layer], _largest(query, key, past_key, scoring), out=received[layer])

    for part in input_ids.split(at_once):
        last = np.arange(len(part)) == len(part) - 1  # no logits are asked for: one row of them
        batch = pack([part])
        run_packed(model, document, batch, last, backend="grouped", observer=note)
    return received


def _largest(query: Tensor, key: Tensor, past_key: Tensor, scoring: Scoring) -> Tensor:
    """``[H, P]`` the largest weight of each prefix token.

    Args:
        query: ``[Hq, T, D]`` of one sequence behind the prefix.
        key: ``[H, T, D]`` of the same.
        past_key: ``[H, P, D]`` of the prefix.
    """
    heads, read, size = past_key.shape
    tokens = key.shape[1]
    by_head = query.float().view(heads, -1, tokens, size)
    past, own = past_key.float(), key.float()
    found = past_key.new_full((heads, read), -math.inf, dtype=torch.float32)
    at_once = max(1, _SCORE_BUDGET // (query.shape[0] * (read + tokens)))
    place = torch.arange(tokens, device=query.device)
    for first in range(0, tokens, at_once):
        some = by_head[:, :, first : first + at_once]
        at = place[first : first + at_once, None]
        of_past, of_own = (_scores(some, keys, scoring) for keys in (past, own))
        hidden = place > at
        if scoring.window is not None:
            hidden = hidden | (at - place >= scoring.window)
            further = read + at - torch.arange(read, device=query.device)
            of_past = of_past.masked_fill(further >= scoring.window, -math.inf)
        of_own = of_own.masked_fill(hidden, -math.inf)
        sums = torch.logaddexp(of_past.logsumexp(-1), of_own.logsumexp(-1))
        # The largest of logarithms: only one number a token is raised again.
        found = torch.maximum(found, (of_past - sums[..., None]).amax(dim=(1, 2)))
    return found.exp()


def _scores(query: Tensor, key: Tensor, scoring: Scoring) -> Tensor:
    """``[H, G, q, D]`` and ``[H, k, D]`` -> ``[H, G, q, k]``."""
    scores = torch.matmul(query * scoring.scaling, key[:, None].transpose(-1, -2))
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    return scores
