"""Cartridges for the tests of the formats."""

from __future__ import annotations

import torch

from cartridge_distill.cartridge.formats.stored_cartridge import CartridgeMeta, StoredCartridge
from cartridge_distill.cartridge.snapshot import Snapshot, split_layers
from tests.tiny import random_cartridge, tiny_model

META = CartridgeMeta(
    "owner/tiny",
    step=7,
    version="run-step-000007",
    document_sha256="ab" * 32,
    recipe={"lr": 0.02, "loss": "forward_kl_topk", "documents": "/somewhere/documents.jsonl"},
    base_revision="c0ffee",
    document_title="A record | of 591 tokens",
    metrics={
        "curve": [{"step": n, "loss": 1.3 - n / 40, "grad_norm": 0.1} for n in range(1, 33)],
        "last_step": {"step": 32, "logprob_diff_max": 3e-5},
        "results": [
            {"condition": "no cartridge", "kl": 1.412, "log_loss": 5.29, "accuracy": 0.27},
            {"condition": "trained cartridge", "kl": 0.637, "log_loss": 2.07, "accuracy": 0.8},
        ],
    },
)


def stored(
    tokens: int = 32,
    frozen: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    meta: CartridgeMeta = META,
) -> StoredCartridge:
    """Of the tiny Llama's shape: 2 layers, 2 kv heads, head size 16."""
    prefix = random_cartridge(tiny_model(), tokens, seed).prefix(dtype)
    keys, values = [[t.detach() for t in side] for side in (prefix.keys, prefix.values)]
    return StoredCartridge(Snapshot(split_layers(keys, values, frozen)), meta)


def same_bits(a: StoredCartridge, b: StoredCartridge) -> bool:
    """Same dtype, same split, same numbers."""
    left, right = dict(a.snapshot.items()), dict(b.snapshot.items())
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )
