"""Keys and values of tokens: a document's for the teacher, some of it for a first cartridge.

The one place where a prefix is computed. What a prefix is lies in ``cartridge``, which knows no
model.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.model.forward import run_packed
from cartridge_distill.model.packing import pack

PREFILL_TOKENS = 8192
"""Tokens of a long document that go through the model at once: bounds the activations."""


@torch.no_grad()
def prefix_from_tokens(
    model: nn.Module, input_ids: Tensor, backend: str = "auto", at_once: int = PREFILL_TOKENS
) -> Prefix:
    """The KV of a forward over ``input_ids``.

    Args:
        model: a model from :func:`cartridge_distill.model.loading.load_model`.
        input_ids: ``[P]`` token ids, the begin-of-text token included where the model has one.
        backend: attention backend, see :mod:`cartridge_distill.model.attention`.
        at_once: a longer document is computed in pieces of so many tokens, each behind the KV of
            those before it.

    Returns:
        A prefix of P tokens in the model's dtype, detached.

    Raises:
        ValueError: ``at_once`` below 1.
        ConfigError: as :func:`cartridge_distill.model.forward.packed_forward`.
    """
    if at_once < 1:
        raise ValueError(f"at_once={at_once}: a piece has at least one token")
    total, done = len(input_ids), 0
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for piece in input_ids.split(at_once):
        cache = DynamicCache()  # without a config: keeps every token, also on windowed layers
        last = np.arange(len(piece)) == len(piece) - 1  # no logits are asked for: one row of them
        so_far = [[kept[:, :, :done] for kept in kind] for kind in (keys, values)]
        before = Prefix(*so_far) if done else None
        run_packed(model, before, pack([piece]), logit_mask=last, backend=backend, cache=cache)
        for kind, name in ((keys, "keys"), (values, "values")):
            new = [getattr(layer, name)[:, :, : len(piece)].detach() for layer in cache.layers]
            if not done:
                # Memory of the whole at once. A copy besides: what a backend filled a row up with
                # is given back.
                kind += [part.new_empty(*part.shape[:2], total, part.shape[3]) for part in new]
            for kept, part in zip(kind, new, strict=True):
                kept[:, :, done : done + len(piece)] = part
        done += len(piece)
    return Prefix(keys, values)
