"""Grouped attention as one step of autograd: a prefix for all tokens at once, and their own past.

The softmax over prefix and own tokens is taken in two parts, each normalised by itself and weighed
by its share of the sum. So the prefix is one product of all tokens a kv head, in the order in which
they lie there, and nothing is joined or cut apart. The backward is in closed form: it keeps the
weights of both parts, and no copies of queries, keys and values.

With scores ``s``, weights ``p`` of a part, its share ``a`` and the gradient ``g`` of the output:
``ds = p * (a g v' - a (g . out))``. What shares and maxima themselves move cancels.

Neither soft caps nor windows are computed here; layers that have them take the plain way
(:mod:`cartridge_distill.model.attention`), which is the readable form of the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cartridge_distill.model.frozen_linear import rows_product
from cartridge_distill.model.fused_causal import is_fusable
from cartridge_distill.model.layout import PackedLayout
from cartridge_distill.model.scoring import Scoring

SCORES_AT_ONCE = 2**20
"""Scores of one product: few enough to stay in a CPU's cache from one pass to the next."""

MOST_SCORES = 2**25
"""A sequence with more scores by itself takes the plain way, which cuts it."""


class Piece(NamedTuple):
    """Some sequences of a group, computed together.

    Attributes:
        queries: ``[n * q]`` computed tokens.
        keys: ``[n * k]`` kept and computed tokens.
        hidden: ``[n, q, 1, k]`` which keys a query must not see.
    """

    queries: Tensor
    keys: Tensor
    hidden: Tensor


class Pieces(NamedTuple):
    """Every computed token once as a query.

    Attributes:
        all: the pieces.
        restore: ``[U]`` where in the pieces' queries, one after the other, each token stands.
        valid: ``[N]`` 1 at those places, 0 where a short sequence is filled up; None: all are.
    """

    all: Sequence[Piece]
    restore: Tensor
    valid: Tensor | None


def is_mergeable(layout: PackedLayout, query: Tensor, key: Tensor, scoring: Scoring) -> bool:
    """Whether :func:`merged_attention` computes what the layer asks for, and should.

    Args:
        query, key: of the layer.
    """
    shapes = [(*group.queries.shape, group.keys.shape[1]) for group in layout.groups()]
    longest = layout.prefix_tokens + max(keys for _, _, keys in shapes)
    if len(shapes) == 1 and shapes[0][0] == 1:
        # A document by itself has a kernel of its own.
        if is_fusable(query, key, shapes[0][1], longest, scoring):
            return False
    return (
        scoring.softcap is None
        and (scoring.window is None or scoring.window >= longest)
        and max(asked * keys for _, asked, keys in shapes) * query.shape[0] <= MOST_SCORES
    )


def pieces_of(layout: PackedLayout, heads: int) -> Pieces:
    """The groups of a layout, cut so that a product has few scores; all its layers share them."""
    known: dict[int, Pieces] = layout.derived
    if heads not in known:
        found: list[Piece] = []
        for group in layout.groups():
            queries, keys = group.queries.shape[1], group.keys.shape[1]
            count = max(1, SCORES_AT_ONCE // (heads * queries * keys))
            parts = (each.split(count) for each in (group.queries, group.places, group.keys))
            for asked, places, read in zip(*parts, strict=True):
                order = torch.arange(keys, device=read.device)
                hidden = (order > places[..., None])[:, :, None]
                found.append(Piece(asked.reshape(-1), read.reshape(-1), hidden))
        restore = layout.first_places([piece.queries for piece in found])
        total = sum(piece.queries.shape[0] for piece in found)
        valid = None
        if total > restore.shape[0]:
            valid = torch.zeros(total, device=restore.device).index_fill_(0, restore, 1.0)
        known[heads] = Pieces(found, restore, valid)
    return known[heads]


def merged_attention(
    layout: PackedLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor] | None,
    scaling: float,
) -> Tensor:
    """Attention of U computed tokens over a prefix and their own past.

    Args:
        query: ``[Hq, U, D]``.
        key, value: ``[H, K + U, D]`` of K kept and U computed tokens.
        past: keys and values ``[H, P, D]`` of the prefix; None without one.

    Returns:
        ``[U, Hq, D]``, contiguous.
    """
    pieces = pieces_of(layout, query.shape[0])
    pk, pv = past if past is not None else (None, None)
    is_saved = torch.is_grad_enabled()
    found: Tensor = _Merged.apply(query, key, value, pk, pv, scaling, pieces, is_saved)
    return found


def _softmax(scores: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights in ``dtype``, and the log of the sum of ``exp(scores)``, last axis kept."""
    weights = torch.softmax(scores, dim=-1)
    # The largest weight is 1 / sum(exp(scores - largest)).
    total = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log_()
    return weights.to(dtype), total


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    """``[Hq, U, D]`` as a view ``[H, U, G, D]``."""
    return tensor.unflatten(0, (heads, -1)).transpose(1, 2)


class _Own(NamedTuple):
    """What a piece reads: ``[H, n, q * G, D]`` queries, ``[H, n, k, D]`` keys and values."""

    query: Tensor
    key: Tensor
    value: Tensor


def _read(piece: Piece, query: Tensor, key: Tensor, value: Tensor) -> _Own:
    """Of queries ``[H, U, G, D]``, keys and values ``[H, K + U, D]``."""
    heads, _, per_head, size = query.shape
    members = piece.hidden.shape[0]
    shape = (heads, members, -1, size)
    taken = query.flatten(2).index_select(1, piece.queries).view(shape)
    read = (each.index_select(1, piece.keys).view(shape) for each in (key, value))
    return _Own(taken, *read)


class _Merged(torch.autograd.Function):
    """See :func:`merged_attention`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        past_key: Tensor | None,
        past_value: Tensor | None,
        scaling: float,
        pieces: Pieces,
        is_saved: bool,
    ) -> Tensor:
        heads, dtype = key.shape[0], query.dtype
        exact = torch.promote_types(dtype, torch.float32)
        # Scaled before the product: the query is far smaller than the scores.
        asked = torch.mul(_by_head(query, heads), scaling).contiguous()
        key, value = key.contiguous(), value.contiguous()
        kept: list[Tensor] = []
        outs, logs = [], []
        for piece in pieces.all:
            own = _read(piece, asked, key, value)
            scores = torch.matmul(own.query, own.key.transpose(2, 3)).to(exact)
            members, length, _, keys = piece.hidden.shape
            split = scores.view(heads, members, length, -1, keys)
            split.masked_fill_(piece.hidden, float("-inf"))
            weights, log = _softmax(scores, dtype)
            outs.append(torch.matmul(weights, own.value).view(heads, members * length, -1))
            logs.append(log.view(heads, members * length, -1))
            kept += [weights] if is_saved else []
        out = torch.cat(outs, dim=1).index_select(1, pieces.restore).view(asked.shape)
        shares = []
        if past_key is not None and past_value is not None:
            log = torch.cat(logs, dim=1).index_select(1, pieces.restore)[..., None]
            behind, of_past, weights_of = _behind(asked, past_key, past_value, exact, is_saved)
            both = torch.logaddexp(log, of_past)
            shares = [(of_past - both).exp_().to(dtype), (log - both).exp_().to(dtype)]
            out = torch.addcmul(behind.mul_(shares[0]), out, shares[1])
            kept += weights_of
        if is_saved:
            ctx.save_for_backward(asked, key, value, past_key, past_value, out, *shares, *kept)
        ctx.scaling, ctx.pieces = scaling, pieces
        return out.transpose(0, 1).reshape(out.shape[1], -1, out.shape[3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        asked, key, value, past_key, past_value, out, *kept = ctx.saved_tensors
        heads, pieces = asked.shape[0], ctx.pieces
        grad = grad.view(grad.shape[0], heads, -1, grad.shape[2]).transpose(0, 1).contiguous()
        exact = torch.promote_types(grad.dtype, torch.float32)
        along = torch.mul(grad, out).sum(-1, keepdim=True, dtype=exact)
        own_grad, own_along = grad, along
        of_past: tuple[Tensor | None, Tensor | None] = (None, None)
        to_query: Tensor | None = None
        if past_key is not None:
            before, own, *kept = kept
            to_query, *found = _behind_backward(
                grad * before, along * before, asked, past_key, past_value, kept[len(pieces.all) :]
            )
            of_past = (found[0], found[1])
            own_grad, own_along = grad * own, along * own
        if not any(ctx.needs_input_grad[:3]):
            return None, None, None, *of_past, None, None, None
        from_own, to_key, to_value = _own_backward(
            pieces, own_grad, own_along, asked, key, value, kept
        )
        to_query = from_own if to_query is None else to_query.add_(from_own)
        to_query = to_query.mul_(ctx.scaling).transpose(1, 2).flatten(0, 1)
        return to_query, to_key, to_value, *of_past, None, None, None


def _behind(
    asked: Tensor, key: Tensor, value: Tensor, exact: torch.dtype, is_saved: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Queries ``[H, U, G, D]`` over a prefix ``[H, P, D]``.

    Returns:
        Values ``[H, U, G, D]``, logs of the sums ``[H, U, G, 1]``, and the weights, in the order of
        :func:`_cut`, if they are saved.
    """
    out = torch.empty_like(asked)
    logs = asked.new_empty((*asked.shape[:3], 1), dtype=exact)
    kept = []
    for head, rows in _cut(asked, key):
        scores = rows_product(asked[head].flatten(0, 1)[rows], key[head]).to(exact)
        weights, logs[head].view(-1, 1)[rows] = _softmax(scores, asked.dtype)
        out[head].view(-1, out.shape[3])[rows] = rows_product(weights, value[head].t())
        kept += [weights] if is_saved else []
    return out, logs, kept


def _cut(asked: Tensor, key: Tensor) -> list[tuple[int, slice]]:
    """Kv heads, and rows of ``[U * G]`` that are computed at once."""
    total = asked.shape[1] * asked.shape[2]
    count = max(1, SCORES_AT_ONCE // key.shape[1])
    cuts = [slice(first, first + count) for first in range(0, total, count)]
    return [(head, rows) for head in range(asked.shape[0]) for rows in cuts]


def _behind_backward(
    grad: Tensor,
    along: Tensor,
    asked: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """``grad [H, U, G, D]`` and ``along [H, U, G, 1]``, weighed -> of queries, keys and values."""
    to_query = torch.empty_like(asked)
    to_key, to_value = torch.zeros_like(key), torch.zeros_like(value)
    for (head, rows), weights in zip(_cut(asked, key), kept, strict=True):
        own, queries = (each[head].flatten(0, 1)[rows] for each in (grad, asked))
        scores = rows_product(own, value[head]).to(along.dtype)
        scores = scores.sub_(along[head].view(-1, 1)[rows]).mul_(weights).to(grad.dtype)
        to_query[head].view(-1, own.shape[1])[rows] = rows_product(scores, key[head].t())
        to_key[head] += torch.mm(scores.t(), queries)
        to_value[head] += torch.mm(weights.t(), own)
    return to_query, to_key, to_value


def _own_backward(
    pieces: Pieces,
    grad: Tensor,
    along: Tensor,
    asked: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_behind_backward`, over the tokens' own past."""
    heads, tokens, size = key.shape
    # By token: one addition then adds all heads.
    sums = [each.new_zeros(tokens, heads, size) for each in (key, value)]
    to_query = []
    first = 0
    for piece, weights in zip(pieces.all, kept, strict=False):
        own = _read(piece, asked, key, value)
        count = piece.queries.shape[0]
        mine, beside = (each.flatten(2).index_select(1, piece.queries) for each in (grad, along))
        if pieces.valid is not None:
            # Results where a sequence is filled up are used by nobody.
            is_used = pieces.valid[first : first + count, None]
            mine, beside = mine.mul_(is_used), beside.mul_(is_used)
        first += count
        mine, beside = mine.view(own.query.shape), beside.view(*own.query.shape[:3], 1)
        scores = torch.matmul(mine, own.value.transpose(2, 3)).to(along.dtype)
        scores = scores.sub_(beside).mul_(weights).to(grad.dtype)
        to_query.append(torch.matmul(scores, own.key).view(heads, count, -1))
        for into, one, other in ((sums[0], scores, own.query), (sums[1], weights, mine)):
            found = torch.matmul(one.transpose(2, 3), other)  # [H, n, k, D]
            found = found.flatten(1, 2).transpose(0, 1).reshape(-1, heads * size)
            into.view(tokens, -1).index_add_(0, piece.keys, found)
    restored = torch.cat(to_query, dim=1).index_select(1, pieces.restore).view(asked.shape)
    return restored, sums[0].transpose(0, 1), sums[1].transpose(0, 1)
