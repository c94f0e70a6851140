"""FlexAttention's ``BlockMask`` of a packed row behind a prefix, from the lengths alone.

``create_block_mask`` evaluates the rule for every query and key: 4 to 10 bytes times T x (P + T),
a gigabyte for a document of 10,000 tokens. Here a block is known from where its sequences begin, so
the mask of 100,000 tokens takes megabytes, and the host computes it without asking the device.

Keys stand in this order: the P tokens of the prefix, filled up to whole blocks with keys that
nobody sees, then the T tokens of the row, which are whole blocks already
(:meth:`~cartridge_distill.model.packing.PackedBatch.filled_up`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cartridge_distill.model.packing import PackedBatch, on_device

BLOCK = 128
"""Queries and keys in a block; rows and prefixes are filled up to a multiple of it."""

LEAST_ROW = 2 * BLOCK
"""A row has two blocks at least: torch compiles a graph of its own for sizes of 1."""

_NO_WINDOW = 2**30  # a window that no distance reaches; int32 holds it
_PREFIX, _FILLING = -1, -2  # seq_ids of keys that are open to all, and to none

Blocks = NDArray[np.bool_]


def filled_prefix(prefix_tokens: int) -> int:
    """The prefix's length in whole blocks of keys."""
    return -(-prefix_tokens // BLOCK) * BLOCK


def classify(batch: PackedBatch, prefix_tokens: int, window: int | None) -> tuple[Blocks, Blocks]:
    """What the blocks of a row's mask are.

    Args:
        batch: T tokens, a multiple of :data:`BLOCK`.
        prefix_tokens: P.
        window: how far a query sees, itself included; None is without a bound.

    Returns:
        ``partial`` and ``full``, each ``[T / BLOCK, (filled P + T) / BLOCK]`` bool: some queries of
        the block see some of its keys, or all see all.

    Raises:
        ValueError: T is not a multiple of the block.
    """
    if batch.num_tokens % BLOCK:
        raise ValueError(f"a row of {batch.num_tokens} tokens is not a multiple of {BLOCK}")
    reach = _NO_WINDOW if window is None else window
    first = np.arange(0, batch.num_tokens, BLOCK)
    last = first + BLOCK - 1
    seq_first, seq_last = batch.seq_ids[first], batch.seq_ids[last]
    index = batch.index.reshape(-1, BLOCK)

    # The prefix's keys stand at positions 0..P-1, a query at P + index.
    key_first = np.arange(0, filled_prefix(prefix_tokens), BLOCK)
    key_last = np.minimum(key_first + BLOCK, prefix_tokens) - 1
    nearest = prefix_tokens + index.min(1)[:, None] - key_last[None, :]
    farthest = prefix_tokens + index.max(1)[:, None] - key_first[None, :]
    some = nearest < reach
    whole = key_first + BLOCK <= prefix_tokens
    every = (farthest < reach) & whole[None, :]

    # The row's own keys. Below the diagonal two blocks have a sequence in common only when the
    # earlier ends in the one that the later begins with; its nearest pair are those two tokens.
    below = first[:, None] > first[None, :]
    same = seq_first[:, None] == seq_last[None, :]
    near = first[:, None] - last[None, :] < reach
    own_some = (below & same & near) | np.eye(len(first), dtype=bool)
    inside = seq_first[None, :] == seq_last[:, None]  # both blocks lie in one sequence
    far = last[:, None] - first[None, :] < reach
    own_every = below & inside & far

    full = np.concatenate([every, own_every], axis=1)
    partial = np.concatenate([some, own_some], axis=1) & ~full
    return partial, full


def _in_order(blocks: Blocks, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many of each row are set, and which come first: ``[1, 1, q]`` and ``[1, 1, q, k]``."""
    counts = blocks.sum(1)
    order = np.argsort(~blocks, axis=1, kind="stable")
    return (
        on_device(counts[None, None], device, torch.int32),
        on_device(order[None, None], device, torch.int32),
    )


def make_block_mask(batch: PackedBatch, prefix_tokens: int, window: int | None) -> Any:
    """The ``BlockMask``, on the batch's device.

    The window is a tensor, not a number: layers with and without one share a compiled graph.
    """
    from torch.nn.attention.flex_attention import BlockMask

    partial, full = classify(batch, prefix_tokens, window)
    device = batch.device
    keys = filled_prefix(prefix_tokens)
    filling = np.full(keys - prefix_tokens, _FILLING)
    prefix = np.full(prefix_tokens, _PREFIX)
    # Filling keys may stand anywhere: their seq_id hides them.
    positions = np.concatenate([np.arange(keys), prefix_tokens + batch.index])
    key_seq = on_device(np.concatenate([prefix, filling, batch.seq_ids]), device, torch.int32)
    key_position = on_device(positions, device, torch.int32)
    query_seq = on_device(batch.seq_ids, device, torch.int32)
    query_position = on_device(prefix_tokens + batch.index, device, torch.int32)
    reach = on_device([_NO_WINDOW if window is None else window], device, torch.int32)

    def rule(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query_position[query] - key_position[key]
        of_prefix = key_seq[key] == _PREFIX
        own = (key_seq[key] == query_seq[query]) & (distance >= 0)
        return (of_prefix | own) & (distance < reach[0])

    return BlockMask.from_kv_blocks(
        *_in_order(partial, device),
        *_in_order(full, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=rule,
        seq_lengths=(batch.num_tokens, keys + batch.num_tokens),
    )
