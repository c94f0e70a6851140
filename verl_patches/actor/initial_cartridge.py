"""The first cartridge of a run: from a document, from a checkpoint, or at random.

Nothing here imports veRL: the engine and a plain loop (``training/study``) begin alike.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from cartridge_distill.cartridge.beginnings import ATTENDED
from cartridge_distill.cartridge.checkpoint import read_cartridge
from cartridge_distill.cartridge.kv_shape import check_fits
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.distill.teacher import Teacher
from cartridge_distill.model.beginning import first_cartridge
from cartridge_distill.model.identity import check_same_weights
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.pasting import pasted_setting

logger = logging.getLogger(__name__)


def initial_cartridge(settings: Any, module: Any, teacher: Teacher, model: str) -> TrainableCache:
    """As ``actor.cartridge.init`` says: from a checkpoint, at random, or from a document.

    Args:
        model: folder or hub id of ``module``.

    Raises:
        ConfigError: the checkpoint has another number of tokens, or it is open which document.
        CartridgeFormatError: it does not fit the model.
    """
    if settings.init == "checkpoint":
        stored = read_cartridge(settings.checkpoint_path)
        # A start, not a use: training goes on from wherever it begins.
        told = check_same_weights(stored.meta, settings.checkpoint_path, model, allow_other=True)
        if told is not None:
            logger.warning("actor.cartridge.init=checkpoint: %s", told)
        cartridge = TrainableCache.from_snapshot(stored.snapshot)
        if cartridge.num_tokens != settings.num_tokens:
            raise ConfigError(
                f"{settings.checkpoint_path} holds {cartridge.num_tokens} tokens, "
                f"actor.cartridge.num_tokens is {settings.num_tokens}; fix: make them equal"
            )
    elif settings.init == "random":
        cartridge = TrainableCache.from_random(
            module.config, settings.num_tokens, settings.num_frozen_tokens, settings.seed
        )
    else:
        name = initial_document(settings, teacher.documents.ids)
        cartridge = first_cartridge(
            module,
            torch.tensor(teacher.document_ids(name), device=teacher.device),
            settings.num_tokens,
            settings.num_frozen_tokens,
            settings.init,
            # The teacher reads it anyhow, and keeps what it has read.
            teacher.prefix(name) if settings.init == ATTENDED else None,
        )
    check_fits(cartridge.prefix().kv_shape, module.config)
    return cartridge


def initial_document(settings: Any, known: list[str]) -> str:
    """The document that a cartridge begins as a part of.

    Raises:
        ConfigError: there are several, and none is chosen.
    """
    if settings.init_document is not None:
        return str(settings.init_document)
    if len(known) > 1:
        raise ConfigError(
            f"{settings.documents} holds {len(known)} documents; fix: set "
            "actor.cartridge.init_document to the one to start from, e.g. "
            + pasted_setting("actor_rollout_ref.actor.cartridge.init_document", known[0])
        )
    return known[0]
