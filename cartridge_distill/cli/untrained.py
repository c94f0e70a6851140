"""``cartridge-distill init``: a cartridge as it is before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cartridge_distill.cartridge.beginnings import TEXT
from cartridge_distill.cartridge.checkpoint import (
    META_FILE,
    CartridgeMeta,
    read_meta,
    write_cartridge,
)
from cartridge_distill.cartridge.formats.detect import check_replaceable
from cartridge_distill.cartridge.formats.stored_cartridge import StoredCartridge
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.cli.program import echo
from cartridge_distill.model.beginning import first_cartridge
from cartridge_distill.model.identity import weights_fingerprint
from cartridge_distill.model.loading import load_model
from cartridge_distill.model.prompts import render_document
from cartridge_distill.model.reading import read_model_config, read_tokenizer
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.extras import require
from cartridge_distill.util.files import check_writable


def make(
    out: Path,
    model: str,
    document: Path | None,
    tokens: int,
    frozen: int,
    seed: int,
    overwrite: bool = False,
    init: str = TEXT,
) -> None:
    """Writes an untrained cartridge.

    Args:
        out: its directory.
        model: folder or hub id of the base model.
        document: file that it starts as a part of, of any kind that ``prepare`` reads; None starts
            it from noise.
        tokens, frozen: of the cartridge; the first ``frozen`` are never trained.
        seed: of the noise.
        overwrite: replace a cartridge that is there, and was not trained.
        init: the part of the document, see ``model.beginning``.

    Raises:
        CartridgeDistillError: model or document cannot be read, or do not fit; or ``out`` holds
            something else than an untrained cartridge.
        FileExistsError: ``out`` is there and ``overwrite`` is false.
    """
    if document is not None:
        require("init --document")
    _check_target(out, overwrite)  # before the model is loaded
    meta = CartridgeMeta(base_model=model, model_fingerprint=weights_fingerprint(model))
    if document is None:
        cartridge = TrainableCache.from_random(read_model_config(model), tokens, frozen, seed)
        meta.recipe["init"] = {"from": "random", "seed": seed}
    else:
        from cartridge_distill.data.documents.one import one_document  # an extra reads documents
        from cartridge_distill.data.records import sha256_of

        source = one_document(document, lambda line: echo(line, err=True))
        ids = render_document(read_tokenizer(model), source.text)
        loaded: Any = load_model(model, torch.float32, "cpu")
        cartridge = first_cartridge(loaded, torch.tensor(ids), tokens, frozen, init)
        meta.document_sha256 = sha256_of(source.text)
        meta.document_title = source.title
        meta.recipe["init"] = {"from": init}
    snapshot = Snapshot.take(cartridge.state_dict(), torch.float32)
    write_cartridge(StoredCartridge(snapshot, meta), out, "native", overwrite)


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists() and not out.is_symlink():
        check_writable(out, "OUT")
        return
    if not overwrite:
        raise FileExistsError(
            f"{out} is already there; fix: name another, or --overwrite an untrained cartridge"
        )
    check_replaceable(out)
    if (out / META_FILE).is_file() and (step := int(read_meta(out).get("step") or 0)):
        raise ConfigError(
            f"{out} was trained for {step} steps and is not replaced by an untrained one; fix: "
            "name another, or delete it yourself"
        )
