"""What the engine begins with: frozen model, first cartridge, questions to validate on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from verl.utils.device import get_device_id
from verl.utils.torch_dtypes import PrecisionType

from cartridge_distill.cartridge.checkpoint import read_cartridge
from cartridge_distill.cartridge.kv_shape import check_fits
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.data.records import load_questions
from cartridge_distill.distill.teacher import Teacher
from cartridge_distill.evaluation.validation import Validation
from cartridge_distill.model.identity import check_same_weights
from cartridge_distill.model.loading import load_model
from cartridge_distill.model.prefill import cartridge_from_text
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.pasting import pasted_setting

logger = logging.getLogger(__name__)


def load_base(model_config: Any, engine_config: Any) -> Any:
    """The frozen model, whole, on this rank's device.

    Raises:
        ConfigError: ``actor.fsdp_config.model_dtype`` is not set, or the model cannot recompute its
            layers and ``model.enable_gradient_checkpointing`` asks for it.
    """
    if engine_config.model_dtype is None:
        raise ConfigError(
            "actor.fsdp_config.model_dtype is null; say bfloat16 (GPU) or float32 (CPU)"
        )
    model = load_model(
        model_config.local_path,
        dtype=PrecisionType.to_dtype(engine_config.model_dtype),
        device=get_device_id(),
    )
    if model_config.enable_gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ConfigError(
                "actor_rollout_ref.model.enable_gradient_checkpointing=True: "
                f"{type(model).__name__} has none; set it to False"
            )
    return model


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
                f"actor.cartridge.num_tokens is {settings.num_tokens}; make them equal"
            )
    elif settings.init == "random":
        cartridge = TrainableCache.from_random(
            module.config, settings.num_tokens, settings.num_frozen_tokens, settings.seed
        )
    else:
        ids = teacher.document_ids(initial_document(settings, teacher.documents.ids))
        cartridge = cartridge_from_text(
            module,
            torch.tensor(ids, device=get_device_id()),
            settings.num_tokens,
            settings.num_frozen_tokens,
        )
    check_fits(cartridge.prefix().kv_shape, module.config)
    return cartridge


def initial_document(settings: Any, known: list[str]) -> str:
    """The document whose first tokens a cartridge begins as.

    Raises:
        ConfigError: there are several, and none is chosen.
    """
    if settings.init_document is not None:
        return str(settings.init_document)
    if len(known) > 1:
        raise ConfigError(
            f"{settings.documents} holds {len(known)} documents; set "
            "actor.cartridge.init_document to the one to start from, e.g. "
            + pasted_setting("actor_rollout_ref.actor.cartridge.init_document", known[0])
        )
    return known[0]


def load_validation(settings: Any, tokenizer: Any, teacher: Teacher) -> Validation | None:
    """Reads the questions now, so that a wrong one does not wait for the first validation."""
    if settings.eval_questions is None:
        return None
    questions = load_questions(Path(settings.eval_questions).expanduser())
    return Validation(tokenizer, questions, teacher)
