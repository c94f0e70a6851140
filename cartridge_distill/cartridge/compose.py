"""Several cartridges in one prompt, joined into one.

Joining is what Tokasaurus does with several ids, in the order given here and in alphabetical order
there: their tokens stand one after the other, and what follows gets positions from the sum of their
token counts on. Keys lie in the files after RoPE, each cartridge's at 0..P-1, and stay so: nothing
is rotated again, and the positions of the parts overlap. So a joined cartridge gives the log-probs
that the server gives for the list of ids, where the ids sort in that order. (To full attention the
order makes no difference, since each key brings its position along; to a sliding window it does.)

**Which tokens are frozen.** Those of the first part. Frozen tokens are the beginning of a cartridge
in every format, so the frozen token in the middle of a joined one cannot be; the choice is between
letting it learn and freezing all that stands before it, whole documents. For serving it makes no
difference; who trains a joined cartridge wants all of its parts to learn. PEFT's
``compose_cartridge_adapters`` chooses the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from cartridge_distill.cartridge.formats.stored_cartridge import CartridgeMeta, StoredCartridge
from cartridge_distill.cartridge.kv_shape import PAGE_TOKENS
from cartridge_distill.cartridge.snapshot import Snapshot, split_layers
from cartridge_distill.util.errors import CartridgeFormatError, ConfigError


def compose(parts: Sequence[StoredCartridge], base_model: str | None = None) -> StoredCartridge:
    """Joins cartridges in the order given.

    Args:
        parts: two or more, of one model; from
            :func:`cartridge_distill.cartridge.checkpoint.read_cartridge`.
        base_model: the model they are for. Needed where none of them says, or where they name one
            model in several ways.

    Returns:
        One cartridge of all their tokens, in the narrowest dtype that holds all of theirs; its
        recipe lists the parts under ``composed_of``.

    Raises:
        ConfigError: fewer than two.
        CartridgeFormatError: they differ in a number, name different models, or one does not fill
            whole pages.
    """
    if len(parts) < 2:
        raise ConfigError(f"{len(parts)} cartridge to join; fix: give two or more")
    for number, part in enumerate(parts, 1):
        _check(number, part, parts[0])
    if base_model is None:
        named = sorted({p.meta.base_model for p in parts if p.meta.base_model is not None})
        if len(named) > 1:
            raise CartridgeFormatError(
                f"the cartridges are for different models, {' and '.join(named)}; fix: if that is "
                "one model under several names, give one with base_model"
            )
        base_model = named[0] if named else None
    fingerprints = {part.meta.model_fingerprint for part in parts}
    if len(fingerprints - {None}) > 1:
        raise CartridgeFormatError(
            "the cartridges were trained with different weights, by their fingerprints: "
            f"{', '.join(sorted(filter(None, fingerprints)))}; joined they would mean nothing; "
            "fix: give cartridges of one model"
        )
    dtype = reduce(torch.promote_types, (part.snapshot.dtype for part in parts))
    keys, values = join_layers([part.to(dtype).snapshot.layers() for part in parts])
    snapshot = Snapshot(split_layers(keys, values, parts[0].snapshot.num_frozen_tokens))
    titles = [part.meta.document_title for part in parts]
    revisions = {part.meta.base_revision for part in parts}
    meta = CartridgeMeta(
        base_model,
        base_revision=revisions.pop() if len(revisions) == 1 else None,
        document_title=" + ".join(title for title in titles if title) if all(titles) else None,
        recipe={"composed_of": [_described(part) for part in parts]},
        model_fingerprint=fingerprints.pop() if len(fingerprints) == 1 else None,
    )
    return StoredCartridge(snapshot, meta)


def join_layers(
    parts: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of several parts, L tensors ``[1, H, P, D]`` each, one after the other.

    Args:
        parts: (keys, values) each, of one dtype and device.
    """

    def join(side: int) -> list[Tensor]:
        layers = zip(*(part[side] for part in parts), strict=True)
        return [torch.cat(of_layer, dim=2) for of_layer in layers]

    return join(0), join(1)


def _check(number: int, part: StoredCartridge, first: StoredCartridge) -> None:
    for name in ("num_layers", "kv_heads", "head_dim"):
        got, want = part.shape()[name], first.shape()[name]
        if got != want:
            raise CartridgeFormatError(
                f"cartridge {number} has {name}={got}, the first has {want}; they are for "
                "different models; fix: give cartridges of one model"
            )
    tokens = part.snapshot.num_tokens
    if tokens % PAGE_TOKENS:
        raise CartridgeFormatError(
            f"cartridge {number} has {tokens} tokens, not a multiple of {PAGE_TOKENS}: Tokasaurus "
            f"counts it as {-(-tokens // PAGE_TOKENS) * PAGE_TOKENS}, so positions after it would "
            "differ between the list of ids and the joined file, and its model worker dies of it; "
            f"fix: train cartridges of a multiple of {PAGE_TOKENS} tokens"
        )


def _described(part: StoredCartridge) -> dict[str, Any]:
    meta = part.meta
    about = {
        "document_title": meta.document_title,
        "document_sha256": meta.document_sha256,
        "version": meta.version,
    }
    return {
        "num_tokens": part.snapshot.num_tokens,
        "step": meta.step,
        **{name: value for name, value in about.items() if value},
    }
