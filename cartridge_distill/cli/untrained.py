"""``cartridge-distill init``: a cartridge as it is before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, save_cartridge
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.data.records import Document
from cartridge_distill.model.loading import load_model
from cartridge_distill.model.prefill import cartridge_from_text
from cartridge_distill.model.prompts import render_document


def make(out: Path, model: str, document: Path | None, tokens: int, frozen: int, seed: int) -> None:
    """Writes an untrained cartridge.

    Args:
        out: its directory.
        model: folder or hub id of the base model.
        document: text file whose first tokens it starts as; None starts it from noise.
        tokens, frozen: of the cartridge; the first ``frozen`` are never trained.
        seed: of the noise.
    """
    meta = CartridgeMeta(base_model=model)
    if document is None:
        config = AutoConfig.from_pretrained(model)
        cartridge = TrainableCache.from_random(config, tokens, frozen, seed)
        meta.recipe["init"] = {"from": "random", "seed": seed}
    else:
        text = document.read_text(encoding="utf-8")
        ids = render_document(AutoTokenizer.from_pretrained(model), text)
        loaded: Any = load_model(model, torch.float32, "cpu")
        cartridge = cartridge_from_text(loaded, torch.tensor(ids), tokens, frozen)
        meta.document_sha256 = Document.of(document.stem, text).sha256
        meta.document_title = document.stem
        meta.recipe["init"] = {"from": "text"}
    save_cartridge(cartridge, out, meta)
