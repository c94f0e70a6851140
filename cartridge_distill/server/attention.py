"""Attention for serving: rows of ragged length behind cartridges that all rows share.

Registered with transformers' attention interface, for models that were compared when they were
loaded (:mod:`cartridge_distill.model.own_attention`). Linear layers see the T tokens of a packed
row and no padding (:mod:`cartridge_distill.server.layout`). Attention has two parts, merged by
their running maximum and sum:

- the *cartridge*: one product of all its rows' queries with one copy of its keys ``[H, P, D]``,
  never repeated per row;
- the row's *own* keys, one product a segment.

Grouped queries are folded into the query axis; keys and values are never repeated. The softmax runs
in float32 whatever the model's dtype. Training has its own attention
(``cartridge_distill.model.attention``): that one needs gradients and no buffers, this one the
reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from cartridge_distill.model.attention_arguments import check_arguments
from cartridge_distill.model.frozen_linear import by_head_product
from cartridge_distill.model.scoring import Scoring
from cartridge_distill.server.layout import SCORE_BUDGET, Group, ServingBatch
from cartridge_distill.util.errors import ConfigError

SERVING_ATTENTION = "cartridge_serving"

_MASKED = torch.finfo(torch.float32).min


def _scores(
    query: Tensor,
    key: Tensor,
    scoring: Scoring,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Tensor:
    scores = product(query, key.transpose(-1, -2)).float().mul_(scoring.scaling)
    if scoring.softcap is not None:
        scores = scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    return scores


def _exp_in_place(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Turns scores into ``exp(scores - max)``; returns the maximum and the sum, last axis kept."""
    # amax of a fully hidden row is _MASKED: its weights become 1, and vanish in the merge.
    top = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return top, weights.sum(dim=-1, keepdim=True)


def _attend_rows(
    batch: ServingBatch,
    layer: int,
    query: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor]:
    """query ``[T, Hq, D]`` against each row's own keys.

    Returns:
        Weighted values ``[T, Hq, D]`` (not normalised), maximum and sum ``[T, Hq, 1]``; float32.
    """
    tokens, query_heads, size = query.shape
    keys, values = batch.buffers.keys[layer], batch.buffers.values[layer]
    heads = keys.shape[1]
    outs: list[Tensor] = []
    tops: list[Tensor] = []
    sums: list[Tensor] = []
    for part in batch.segments:
        taken = query[part.start : part.end] if part.places is None else query[part.places]
        # [n, q, H, G, D] -> [n, H, G * q, D]
        shaped = taken.reshape(part.rows, part.queries, heads, -1, size).permute(0, 2, 3, 1, 4)
        slots = slice(part.first, part.first + part.rows)
        key, value = keys[slots, :, : part.keys], values[slots, :, : part.keys]
        scores = _scores(shaped.flatten(2, 3), key, scoring)
        split = scores.view(part.rows, heads, -1, part.queries, part.keys)
        hidden = part.hidden(scoring.window)
        if hidden is not None:
            split.masked_fill_(hidden, _MASKED)
        top, total = _exp_in_place(split)
        out = torch.matmul(scores.to(value.dtype), value).float()
        for result, into in (
            (out.view(part.rows, heads, -1, part.queries, size), outs),
            (top, tops),
            (total, sums),
        ):
            # [n, H, G, q, *] -> [n * q, Hq, *]
            flat = result.permute(0, 3, 1, 2, 4).reshape(-1, query_heads, result.shape[-1])
            into.append(flat if part.valid is None else flat[part.valid])
    if len(outs) == 1:
        return outs[0], tops[0], sums[0]
    return torch.cat(outs), torch.cat(tops), torch.cat(sums)


def _attend_prefix(
    group: Group,
    layer: int,
    query: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor]:
    """query ``[t, Hq, D]`` against one shared prefix; as :func:`_attend_rows`."""
    tokens, query_heads, size = query.shape
    key, value = group.prefix.keys[layer][0], group.prefix.values[layer][0]  # [H, P, D]
    heads, prefix_tokens = key.shape[0], key.shape[1]
    step = max(1, SCORE_BUDGET // (query_heads * prefix_tokens))
    outs: list[Tensor] = []
    tops: list[Tensor] = []
    sums: list[Tensor] = []
    for at in range(0, tokens, step):
        taken = query[at : at + step]
        n = taken.shape[0]
        # [t, H, G, D] -> [H, t * G, D]: one product for every row
        shaped = taken.reshape(n, heads, -1, size).transpose(0, 1).flatten(1, 2)
        scores = _scores(shaped, key, scoring, by_head_product)
        if scoring.window is not None:
            index = group.query_index[at : at + step, None]
            distance = prefix_tokens + index - torch.arange(prefix_tokens, device=index.device)
            scores.view(heads, n, -1, prefix_tokens).masked_fill_(
                (distance >= scoring.window)[:, None], _MASKED
            )
        top, total = _exp_in_place(scores)
        out = by_head_product(scores.to(value.dtype), value).float()
        for result, into in ((out, outs), (top, tops), (total, sums)):
            split = result.view(heads, n, -1, result.shape[-1]).transpose(0, 1)
            into.append(split.reshape(n, query_heads, -1))
    if len(outs) == 1:
        return outs[0], tops[0], sums[0]
    return torch.cat(outs), torch.cat(tops), torch.cat(sums)


def _merge(
    one: tuple[Tensor, Tensor, Tensor], two: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Joins two parts of one softmax; returns the values (not normalised) and the sum."""
    top = torch.maximum(one[1], two[1])
    first, second = (one[1] - top).exp_(), (two[1] - top).exp_()
    return one[0] * first + two[0] * second, one[2] * first + two[2] * second


def serving_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    serving_batch: ServingBatch | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every attention layer.

    Args:
        query: ``[1, Hq, T, D]``; key, value: ``[1, H, T, D]`` of the T new tokens, after RoPE. They
            are written into the row buffers here.
        serving_batch: handed through from the engine's model call.
        others: what changes nothing, see :mod:`cartridge_distill.model.attention_arguments`.

    Returns:
        ``[1, T, Hq, D]`` and None (no attention weights).

    Raises:
        ConfigError: called without a batch, or with what it cannot compute exactly.
    """
    if serving_batch is None:
        raise ConfigError(
            f"attention {SERVING_ATTENTION!r} was called outside the serving engine, and a model "
            "that serves cannot be used for anything else at the same time; fix: load it once more"
        )
    batch = serving_batch
    layer = cast(int, module.layer_idx)
    check_arguments(layer, attention_mask, key, value, others)
    batch.layers_seen.add(layer)
    for buffers, new in ((batch.buffers.keys, key), (batch.buffers.values, value)):
        tokens = new[0].transpose(0, 1)  # [T, H, D]
        if batch.write_sources is not None:
            tokens = tokens[batch.write_sources]
        buffers[layer][batch.write_slots, :, batch.write_index] = tokens
    by_token = query[0].transpose(0, 1)  # [T, Hq, D]
    scoring = Scoring.of_layer(query, scaling, softcap, sliding_window)
    of_rows = _attend_rows(batch, layer, by_token, scoring)
    out, total = of_rows[0], of_rows[2]
    for group in batch.groups:
        taken = by_token if group.places is None else by_token[group.places]
        source = batch.kv_sources[layer]
        of_prefix = _attend_prefix(group, source, taken, scoring)
        if group.places is None:
            out, total = _merge(of_rows, of_prefix)
        else:
            # A token has one prefix, so groups do not overlap and order does not matter.
            part = (of_rows[0][group.places], of_rows[1][group.places], of_rows[2][group.places])
            merged = _merge(part, of_prefix)
            out[group.places], total[group.places] = merged
    return (out / total).to(query.dtype)[None], None


def register() -> None:
    """Makes the function known to transformers; safe to repeat."""
    AttentionInterface.register(SERVING_ATTENTION, serving_attention)
