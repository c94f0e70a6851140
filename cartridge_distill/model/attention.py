"""Packed attention with a shared prefix: causal within a sequence, open to the prefix.

One attention function is registered with transformers' attention interface, so no model file is
forked. A :class:`~cartridge_distill.model.layout.PackedLayout` travels with the model call and
tells the function which tokens belong together. Three backends give the same result:

``flex``
    FlexAttention with a ``BlockMask``, compiled (:mod:`cartridge_distill.model.flex`); the default
    on a GPU. No backward on CPU (torch 2.13).
``grouped``
    Plain matmuls. The prefix is one large product for all tokens; a sequence's own part is computed
    in groups of sequences of like length, so the work grows with ``T * P + sum(length ** 2)`` and
    neither keys nor values are repeated for grouped queries. Tokens with the same past (samples of
    one prompt) are computed once, through the whole model, and a teacher's prompts that were there
    before not at all (:mod:`cartridge_distill.model.kept_tokens`). A long sequence by itself, as a
    document is, goes through a fused kernel where it can
    (:mod:`cartridge_distill.model.fused_causal`). The default on a CPU.
``dense``
    One product under a full ``[T, P + T]`` mask: the readable reference for the other two.

A call that reaches this function without a layout is an error, and so is a forward in which some
layer did not come through here: nothing falls back to full attention. Dropout is not applied
(the base model is frozen and in eval mode).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from cartridge_distill.model.attention_arguments import check_arguments
from cartridge_distill.model.flex import flex_attention_of
from cartridge_distill.model.fused_causal import fused_causal, is_fusable
from cartridge_distill.model.layout import PackedLayout
from cartridge_distill.model.scoring import Scoring
from cartridge_distill.util.errors import ConfigError

ATTENTION_NAME = "cartridge_packed"
BACKENDS = ("auto", "flex", "grouped", "dense")

# Scores held at once by one grouped product, in elements: 32 Mi floats are 128 MiB. Bounds the
# memory of a teacher with a long document on a CPU; the result does not depend on it.
_SCORE_BUDGET = 32 * 1024 * 1024


def resolve_backend(backend: str, device: torch.device) -> str:
    """ "auto" by device; anything else as given.

    Raises:
        ConfigError: an unknown name.
    """
    if backend not in BACKENDS:
        raise ConfigError(
            f"attention backend {backend!r} is unknown; fix: choose one of {BACKENDS}"
        )
    if backend == "auto":
        return "flex" if device.type == "cuda" else "grouped"
    return backend


def _scores(query: Tensor, key: Tensor, scoring: Scoring) -> Tensor:
    # Scaled before the product: the query is far smaller than the scores.
    scores = torch.matmul(query * scoring.scaling, key.transpose(-1, -2))
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    return scores


def _weights(scores: Tensor, dtype: torch.dtype) -> Tensor:
    # float32 softmax whatever the model's dtype, as transformers' eager attention does.
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(dtype)


def _dense(
    layout: PackedLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor] | None,
    scoring: Scoring,
) -> Tensor:
    """query ``[Hq, T, D]``, key and value ``[H, T, D]`` -> ``[Hq, T, D]``."""
    heads, tokens, size = key.shape
    if past is not None:
        key, value = torch.cat([past[0], key], dim=1), torch.cat([past[1], value], dim=1)
    grouped = query.reshape(heads, -1, tokens, size)
    scores = _scores(grouped, key[:, None], scoring)
    scores = scores.masked_fill(~layout.allowed(scoring.window), float("-inf"))
    return torch.matmul(_weights(scores, value.dtype), value[:, None]).reshape(query.shape)


def _group_attention(
    layout: PackedLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    past: tuple[Tensor, Tensor] | None,
    scoring: Scoring,
) -> Tensor:
    """n sequences: query ``[H, n, G, q, D]`` at ``[n, q]`` places; key, value ``[H, n, k, D]``."""
    heads, members, per_head, length, _ = query.shape
    keys = key.shape[2]
    own = _scores(query.flatten(2, 3), key, scoring)  # [H, n, G * q, k]
    distance = places[:, None, :, None] - torch.arange(keys, device=query.device)
    allowed = distance >= 0
    if scoring.window is not None:
        allowed &= distance < scoring.window
    own = own.view(heads, members, per_head, length, keys).masked_fill(~allowed, float("-inf"))
    if past is None:
        weights = _weights(own, value.dtype).flatten(2, 3)
        return torch.matmul(weights, value).view(query.shape)
    shared = _scores(query.flatten(1, 3), past[0], scoring)  # one product for all
    shared = shared.view(heads, members, per_head, length, -1)
    if scoring.window is not None:
        visible = layout.prefix_allowed(places, scoring.window)[:, None]
        shared = shared.masked_fill(~visible, float("-inf"))
    weights = _weights(torch.cat([shared, own], dim=-1), value.dtype)
    from_past = weights[..., : layout.prefix_tokens].reshape(heads, -1, layout.prefix_tokens)
    from_own = weights[..., layout.prefix_tokens :].flatten(2, 3)
    out = torch.matmul(from_past, past[1]).view(query.shape)
    return out + torch.matmul(from_own, value).view(query.shape)


def _grouped(
    layout: PackedLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor] | None,
    scoring: Scoring,
) -> Tensor:
    """query ``[Hq, U, D]``, key, value ``[H, K + U, D]`` of K kept and U computed tokens

    -> ``[Hq, U, D]``.
    """
    heads, _, size = key.shape
    by_head = query.view(heads, -1, query.shape[1], size)
    pieces: list[Tensor] = []
    asked: list[Tensor] = []
    for group in layout.groups():
        members, queries = group.queries.shape
        longest = group.keys.shape[1]
        seen = layout.prefix_tokens + longest
        if members == 1 and is_fusable(query, key, queries, seen, scoring):
            known = (key[:, group.keys[0]], value[:, group.keys[0]])
            if past is not None:
                known = (torch.cat([past[0], known[0]], 1), torch.cat([past[1], known[1]], 1))
            out = fused_causal(by_head[:, :, group.queries[0]], *known, scoring.scaling)
            pieces.append(out.reshape(query.shape[0], -1, size))
            asked.append(group.queries[0])
            continue
        row_cost = query.shape[0] * seen
        at_once = max(1, _SCORE_BUDGET // row_cost)  # queries
        n_at_once, q_at_once = max(1, at_once // queries), min(queries, at_once)
        for n in range(0, members, n_at_once):
            some = slice(n, n + n_at_once)
            k = key[:, group.keys[some]]  # [H, n, k, D]
            v = value[:, group.keys[some]]
            for first in range(0, queries, q_at_once):
                rows = group.queries[some, first : first + q_at_once]
                q = by_head[:, :, rows].transpose(1, 2)  # [H, n, G, q, D]
                places = group.places[some, first : first + q_at_once]
                out = _group_attention(layout, q, k, v, places, past, scoring)
                pieces.append(out.transpose(1, 2).reshape(query.shape[0], -1, size))
                asked.append(rows.reshape(-1))
    return torch.cat(pieces, dim=1)[:, layout.restore(asked)]


_IMPLEMENTATIONS = {"flex": flex_attention_of, "grouped": _grouped, "dense": _dense}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed_layout: PackedLayout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every attention layer.

    Args:
        query: ``[1, Hq, T, D]``; key, value: ``[1, H, T, D]``, after RoPE.
        packed_layout: handed through from :func:`cartridge_distill.model.forward.packed_forward`.
        others: what changes nothing, see :mod:`cartridge_distill.model.attention_arguments`.

    Returns:
        ``[1, T, Hq, D]``, contiguous (some models take views of it), and None (no attention
        weights).

    Raises:
        ConfigError: called without a layout, or with what it cannot compute exactly.
    """
    if packed_layout is None:
        raise ConfigError(
            f"attention {ATTENTION_NAME!r} was called without a packed layout; fix: call the model "
            "through cartridge_distill.model.forward.packed_forward, or load it with another "
            "attn_implementation"
        )
    layer = cast(int, module.layer_idx)
    check_arguments(layer, attention_mask, key, value, others)
    packed_layout.note_layer(layer)
    past, row = None, (key[0], value[0])
    if packed_layout.kept is not None:
        own = packed_layout.kv_sources[layer]
        row = packed_layout.kept.take(own, *row, owner=own == layer)
    if packed_layout.prefix is not None:
        own = packed_layout.kv_sources[layer]
        # The cast is part of the graph: an fp32 master cartridge gets its gradient through it.
        past = (
            packed_layout.prefix.keys[own][0].to(query.dtype),
            packed_layout.prefix.values[own][0].to(query.dtype),
        )
        if past[0].shape[::2] != key.shape[1::2]:
            raise ConfigError(
                f"layer {layer} attends to {key.shape[1]} kv heads of {key.shape[3]} numbers, the "
                f"prefix has {past[0].shape[0]} of {past[0].shape[2]}; fix: use a model that "
                "attends to what its cache holds"
            )
    attend = _IMPLEMENTATIONS[packed_layout.backend]
    scoring = Scoring.of_layer(query, scaling, softcap, sliding_window)
    if packed_layout.observer is not None and past is not None:
        source = packed_layout.kv_sources[layer]
        packed_layout.observer(source, query[0], row[0], past[0], scoring)
    out = attend(packed_layout, query[0], *row, past, scoring)
    return out.transpose(0, 1).contiguous()[None], None


def register() -> None:
    """Makes the function known to transformers under :data:`ATTENTION_NAME`; safe to repeat."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
