"""What veRL's engine begins with: the frozen model, and the questions to validate on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verl.utils.device import get_device_id
from verl.utils.torch_dtypes import PrecisionType

from cartridge_distill.data.records import load_questions
from cartridge_distill.distill.teacher import Teacher
from cartridge_distill.evaluation.validation import Validation
from cartridge_distill.model.loading import load_model
from cartridge_distill.util.errors import ConfigError


def load_base(model_config: Any, engine_config: Any) -> Any:
    """The frozen model, whole, on this rank's device.

    Raises:
        ConfigError: ``actor.fsdp_config.model_dtype`` is not set, or the model cannot recompute its
            layers and ``model.enable_gradient_checkpointing`` asks for it.
    """
    if engine_config.model_dtype is None:
        raise ConfigError(
            "actor.fsdp_config.model_dtype is null; fix: say bfloat16 (GPU) or float32 (CPU)"
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
                f"{type(model).__name__} has none; fix: set it to False"
            )
    return model


def load_validation(settings: Any, tokenizer: Any, teacher: Teacher) -> Validation | None:
    """Reads the questions now, so that a wrong one does not wait for the first validation."""
    if settings.eval_questions is None:
        return None
    questions = load_questions(Path(settings.eval_questions).expanduser())
    tokens = settings.eval_own_text_tokens
    return Validation(tokenizer, questions, teacher, own_text_tokens=tokens)
