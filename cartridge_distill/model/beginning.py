"""What a cartridge begins as, before the first step: some tokens of a document.

text      its first P tokens
spans     spans of 16 tokens, evenly over the whole of it, read one after the other
attended  for each head the P tokens that it needs to repeat the document
          (:mod:`cartridge_distill.model.attended`)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cartridge_distill.cartridge.beginnings import ATTENDED, BEGINNINGS, SPANS, TEXT
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.model.attended import attended_prefix
from cartridge_distill.model.prefill import prefix_from_tokens
from cartridge_distill.util.errors import ConfigError, nearest

SPAN_TOKENS = 16


def first_cartridge(
    model: nn.Module,
    input_ids: Tensor,
    num_tokens: int,
    num_frozen_tokens: int = 1,
    init: str = TEXT,
    document: Prefix | None = None,
) -> TrainableCache:
    """A cartridge that begins as tokens of a document.

    Args:
        model: the base model, from :func:`cartridge_distill.model.loading.load_model`.
        input_ids: ``[>= num_tokens]`` ids from
            :func:`cartridge_distill.model.prompts.render_document`, begin-of-text token included.
        init: one of ``BEGINNINGS``.
        document: the document's KV, where it has been computed.

    Raises:
        ConfigError: the document is shorter than the cartridge; or ``init`` is unknown, or not to
            be had of this model and document.
    """
    prefix = first_prefix(model, input_ids, num_tokens, num_frozen_tokens, init, document)
    return TrainableCache(prefix, num_frozen_tokens)


def first_prefix(
    model: nn.Module,
    input_ids: Tensor,
    num_tokens: int,
    num_frozen_tokens: int,
    init: str,
    document: Prefix | None = None,
) -> Prefix:
    """As :func:`first_cartridge`, the keys and values alone, in the model's dtype."""
    if input_ids.shape[0] < num_tokens:
        raise ConfigError(
            f"the document has {input_ids.shape[0]} tokens, the cartridge {num_tokens}; "
            "fix: use fewer cartridge tokens or a longer document"
        )
    if init == ATTENDED:
        return attended_prefix(model, input_ids, num_tokens, num_frozen_tokens, document)
    if init == SPANS:
        places = span_places(input_ids.shape[0], num_tokens)
        return prefix_from_tokens(model, input_ids[places.to(input_ids.device)])
    if init == TEXT:
        return prefix_from_tokens(model, input_ids[:num_tokens])
    raise ConfigError(f"init={init!r} is unknown{nearest(init, BEGINNINGS)}")


def span_places(document_tokens: int, num_tokens: int) -> Tensor:
    """``[num_tokens]`` places of the tokens of evenly spaced spans, the first and the last among
    them, in order; none twice.

    Args:
        document_tokens: at least ``num_tokens``.
    """
    count = max(1, num_tokens // SPAN_TOKENS)
    lengths = [num_tokens // count + (n < num_tokens % count) for n in range(count)]
    left = document_tokens - num_tokens  # tokens that no span has, to lie between them
    places: list[Tensor] = []
    taken = 0
    for number, length in enumerate(lengths):
        skipped = left * number // (count - 1) if count > 1 else 0
        places.append(torch.arange(length) + taken + skipped)
        taken += length
    return torch.cat(places)
