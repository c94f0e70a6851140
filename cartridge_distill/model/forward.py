"""The one forward of the project: frozen model, shared prefix, packed row.

Student (prefix = cartridge) and teacher (prefix = document KV) both call
:func:`packed_forward`; so do initialisation and evaluation. Positions are
``prefix length + index``, as in Tokasaurus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from cartridge_distill.cartridge.kv_shape import check_fits, kv_sources, text_config
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.model.attention import ATTENTION_NAME, resolve_backend
from cartridge_distill.model.blocks import BLOCK, LEAST_ROW
from cartridge_distill.model.kept_tokens import Kept, KeptOfRow
from cartridge_distill.model.layout import Observer, PackedLayout
from cartridge_distill.model.packing import (
    HostIndex,
    HostMask,
    PackedBatch,
    host_mask,
    on_device,
)
from cartridge_distill.util.errors import ConfigError


def run_packed(
    model: nn.Module,
    prefix: Prefix | None,
    batch: PackedBatch,
    logit_mask: Tensor | HostMask | None = None,
    backend: str = "auto",
    cache: Any = None,
    starts: Sequence[int] | None = None,
    kept: Kept | None = None,
    observer: Observer | None = None,
) -> Tensor:
    """As :func:`packed_forward`, with a transformers cache that collects the row's own KV.

    Args:
        observer: is told of the queries and keys behind a prefix, layer by layer.
        starts: B positions at which the sequences begin; right after the prefix by default.

    Raises:
        ConfigError: as :func:`packed_forward`; or a cache is to be filled while layers are
            computed again.
        ValueError: ``kept`` where gradients are computed, or with ``cache`` or ``starts``.
    """
    if kept is not None and (torch.is_grad_enabled() or cache is not None or starts is not None):
        raise ValueError(
            "kept tokens stand behind a frozen prefix, at their usual positions: run it under "
            "torch.no_grad(), without cache and starts"
        )
    config = text_config(model.config)
    if config._attn_implementation != ATTENTION_NAME:
        raise ConfigError(
            f"the model's attention is {config._attn_implementation!r}, not {ATTENTION_NAME!r}: "
            "packed sequences would see each other; fix: load it with "
            "cartridge_distill.model.loading.load_model or pass it through prepare_model()"
        )
    if cache is not None and any(layer.training for layer in _checkpointing_layers(model)):
        raise ConfigError(
            "transformers' gradient checkpointing throws away the cache that collects the KV; "
            "fix: collect it outside of recomputing_layers() and in eval mode"
        )
    if prefix is not None:
        check_fits(prefix.kv_shape, config)
    prefix_tokens = prefix.num_tokens if prefix is not None else 0
    longest = prefix_tokens + max(batch.lengths)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"prefix of {prefix_tokens} + sequence of {max(batch.lengths)} = {longest} tokens is "
            f"over the model's context of {limit}; fix: shorten the document, prompt or response"
        )
    # A cache that collects the row's KV wants every token of it.
    mask = None if logit_mask is None else host_mask(logit_mask)
    if mask is not None and cache is None:
        batch, mask = batch.up_to_last(mask)
    if mask is None:
        mask = np.ones(batch.num_tokens, dtype=bool)
    backend = resolve_backend(backend, batch.device)
    if backend == "flex":
        batch = batch.filled_up(BLOCK, LEAST_ROW)
    # Tokens with one past are computed once; at other positions they have another.
    share = cache is None and starts is None
    known: KeptOfRow | None = None
    if kept is not None and backend == "grouped" and mask.any():
        known = kept.of_row(batch, _first_of_each(batch, mask))
    layout = PackedLayout(batch, prefix, backend, share, kv_sources(config), known)
    layout.observer = observer
    rows = layout.of_token[np.flatnonzero(mask)]
    if (rows < 0).any():
        raise ValueError("logits of tokens that are kept and not computed; ask for later ones")
    ids = batch.input_ids
    if len(layout.computed) < batch.num_tokens:
        ids = ids[on_device(layout.computed, batch.device, torch.long)]
    positions = batch.index[layout.computed]
    if starts is None:
        positions = prefix_tokens + positions
    else:
        positions = np.array(starts)[batch.seq_ids[layout.computed]] + positions
    output = model(
        input_ids=ids[None],
        position_ids=on_device(positions, batch.device, torch.long)[None],
        past_key_values=cache,
        use_cache=cache is not None,
        packed_layout=layout,
        logits_to_keep=on_device(rows, batch.device, torch.long),
    )
    layout.check_used_by_all(config.num_hidden_layers)
    if known is not None:
        known.keep()
    logits: Tensor = output.logits[0]
    return logits


def _first_of_each(batch: PackedBatch, mask: HostMask) -> HostIndex:
    """``[B]`` the place in each sequence of its first row that a mask names; it names one."""
    first = np.array(batch.lengths)
    np.minimum.at(first, batch.seq_ids[mask], batch.index[mask])
    return first


def _checkpointing_layers(model: nn.Module) -> list[nn.Module]:
    """Layers that recompute themselves in the backward when they are in training mode."""
    return [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]


@contextmanager
def recomputing_layers(model: nn.Module) -> Iterator[None]:
    """In here, a forward keeps each layer's input alone; the backward computes the rest again.

    Exact, a quarter to a third slower, and of a layer's activations only one is kept. The prefix
    stays: it comes with the call and not as a transformers cache, which checkpointing would drop.
    Nothing but the layers themselves changes to training mode, so no dropout starts.

    Args:
        model: from :func:`cartridge_distill.model.loading.load_model`.

    Raises:
        ConfigError: the model's layers cannot do it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"{type(model).__name__} has no gradient checkpointing; fix: do without "
            "recomputing_layers()"
        )
    if not _checkpointing_layers(model):
        # Not reentrant: the layers' inputs need no gradient, what they attend to does.
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    layers = _checkpointing_layers(model)
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def packed_forward(
    model: nn.Module,
    prefix: Prefix | None,
    batch: PackedBatch,
    logit_mask: Tensor | HostMask | None = None,
    backend: str = "auto",
    kept: Kept | None = None,
) -> Tensor:
    """Logits of a packed batch behind a shared prefix.

    Args:
        model: frozen decoder from :func:`cartridge_distill.model.loading.load_model`.
        prefix: P tokens visible to every token, or None for the bare model.
        batch: the packed sequences, T tokens.
        logit_mask: ``[T]`` bool; only these rows go through the vocabulary projection, and what
            follows a sequence's last one is not computed at all. All by default. A mask on a GPU
            is fetched, for which the host waits; :meth:`PackedBatch.predicts` gives one on the
            host, from the mask of the tokens that count.
        backend: "auto", "flex", "grouped" or "dense", see :mod:`cartridge_distill.model.attention`.
        kept: where the keys and values of the sequences' beginnings are looked up and kept, up to
            the first row of ``logit_mask``. For a frozen prefix, without gradients; the backend
            "grouped" alone uses it, the others compute all.

    Returns:
        ``[T or kept, V]`` logits in the model's dtype; row i is the distribution of token i + 1.

    Raises:
        ConfigError: wrong attention implementation, or too many positions for the model.
        CartridgeFormatError: the prefix does not fit the model.
        ValueError: ``kept`` where gradients are computed.
    """
    return run_packed(model, prefix, batch, logit_mask, backend, kept=kept)
