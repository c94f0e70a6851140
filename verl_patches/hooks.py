"""What the patched veRL calls. One function a hook; the patches hold nothing but the calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cartridge_distill.util.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

ENGINE_MODEL_TYPE = "cartridge_language_model"
TRAINER_MODE = "cartridge"

LossFn = Callable[..., tuple["Tensor", dict[str, Any]]]


def use_cartridge_engine(training_config: Any, actor_config: Any) -> LossFn:
    """Makes veRL's training worker build the cartridge engine; called by fsdp_workers.patch.

    Args:
        training_config: veRL's ``TrainingWorkerConfig`` of the actor.
        actor_config: veRL's ``ActorConfig`` with our ``cartridge`` field.

    Returns:
        The loss function for ``TrainingWorker.set_loss_fn``.
    """
    # veRL's configs freeze a field once it is set; this one was derived from the model config
    # before the hook, and there is no later place to choose the engine.
    object.__setattr__(training_config, "model_type", ENGINE_MODEL_TYPE)
    # The engine and the rollout adapter both get the model config, and nothing else of ours.
    training_config.model_config.cartridge = actor_config.cartridge
    training_config.model_config.cartridge_dtype = training_config.engine_config.model_dtype
    return distill_loss


def cartridge_config_of(model_config: Any) -> Any:
    """The ``CartridgeConfig`` that :func:`use_cartridge_engine` attached.

    Raises:
        ConfigError: none is there: the actor was built without a cartridge.
    """
    config = getattr(model_config, "cartridge", None)
    if config is None:
        raise ConfigError(
            "rollout 'tokasaurus' serves a cartridge, and none is being trained; fix: set "
            "actor_rollout_ref.actor.cartridge.enabled=True"
        )
    return config


def distill_loss(
    model_output: dict[str, Tensor], data: Any, dp_group: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """Mean over the response tokens of the whole mini-batch, on all ranks and micro-batches.

    Args:
        model_output: ``token_loss`` ``[N]`` of this micro-batch.
        data: the micro-batch; ``batch_num_tokens`` counts the response tokens of all.

    Returns:
        The micro-batch's share, scaled so that the average over ranks is the mean.
    """
    token_loss = model_output["token_loss"]
    loss = token_loss.sum() * (data["dp_size"] / data["batch_num_tokens"])
    return loss, {}
