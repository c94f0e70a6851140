"""Causal attention of one long sequence on a CPU: torch's fused kernel, without gradients.

Reading a document asks for all its tokens at once. As plain products, scores of every query and key
are made, also of those that a query must not see, and written to memory several times. torch's
kernel for CPUs works block by block, leaves out what lies above the diagonal, and holds no more
than a block.

The kernel knows neither soft caps nor windows; layers that have them keep the plain products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cartridge_distill.model.scoring import Scoring

LEAST_QUERIES = 64
"""With fewer the products are small, and a copy of the keys behind a prefix would cost more."""

CHUNK = 512
"""Queries at once behind keys that are there already; their mask has so many rows."""


def is_fusable(query: Tensor, key: Tensor, queries: int, longest: int, scoring: Scoring) -> bool:
    """Whether :func:`fused_causal` computes what the layer asks for.

    Args:
        query, key: of the layer.
        queries: of the sequence.
        longest: keys that its last token may see, the prefix included.
    """
    return (
        queries >= LEAST_QUERIES
        and query.device.type == "cpu"
        and query.dtype == key.dtype
        and scoring.softcap is None
        and (scoring.window is None or scoring.window >= longest)
        and not torch.is_grad_enabled()
    )


def fused_causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention of the last q of k tokens: each sees itself and all before it.

    Args:
        query: ``[H, G, q, D]``.
        key, value: ``[H, k, D]``, the prefix first.

    Returns:
        ``[H, G, q, D]``.
    """
    # A kv head stands for its G query heads without being repeated in memory.
    key, value = (part[:, None].expand(-1, query.shape[1], -1, -1) for part in (key, value))
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    parts = []
    for first in range(0, queries, CHUNK):
        some = query[:, :, first : first + CHUNK]
        count = some.shape[2]
        seen = keys - queries + first + count
        mask = torch.ones(count, seen, dtype=torch.bool, device=query.device)
        mask[:, seen - count :].tril_()
        known = key[:, :, :seen], value[:, :, :seen]
        parts.append(scaled_dot_product_attention(some, *known, attn_mask=mask, scale=scaling))
    return torch.cat(parts, dim=2)
