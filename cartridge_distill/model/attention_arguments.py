"""What a decoder may hand to an attention function of ours beside queries, keys and values.

transformers passes on whatever a model's forward was called with, and some models add arguments of
their own: a mask, indices of the keys that count, sinks. With one that is not looked at, attention
is computed as if it were not there. Each argument is therefore known by name, with the values at
which it changes nothing; any other argument or value is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from cartridge_distill.util.errors import ConfigError


def _none(value: Any) -> bool:
    return value is None


def _off(value: Any) -> bool:
    return value is None or value is False


def _anything(value: Any) -> bool:
    return True


HARMLESS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "dropout": (lambda value: value is None or value == 0, "0, as in eval mode"),
    "is_causal": (lambda value: value is None or value is True, "None or True: it is causal"),
    # The layout knows the order of the tokens, and queries and keys come with their rotation.
    "position_ids": (_anything, "anything"),
    "cache_position": (_anything, "anything"),
    # The cache is the caller's; keys and values have been through it.
    "use_cache": (_anything, "anything"),
    # What to hand back: nothing more than the result is handed back.
    "output_attentions": (_off, "None or False"),
    "output_hidden_states": (_anything, "anything"),
    "output_router_logits": (_anything, "anything"),
    "return_dict": (_anything, "anything"),
    "head_mask": (_none, "None"),
    "encoder_hidden_states": (_none, "None"),
    "encoder_attention_mask": (_none, "None"),
    "s_aux": (_none, "None: attention sinks are not computed"),
}
"""Arguments by name: at which values they change nothing, and these values in words."""


def check_arguments(
    layer: int, mask: Tensor | None, key: Tensor, value: Tensor, others: Mapping[str, Any]
) -> None:
    """Refuses what the packed attention and the serving attention would leave out.

    Args:
        layer: for messages.
        mask: the model's own mask; the layout stands for it, so there must be none.
        key, value: ``[1, H, T, D]``.
        others: every argument that the attention function has no use for.

    Raises:
        ConfigError: naming the argument.
    """
    if mask is not None:
        raise ConfigError(
            f"layer {layer} comes with an attention mask of its own; which token sees which is "
            "then not known from windows alone; fix: use a model without one"
        )
    if key.shape != value.shape:
        raise ConfigError(
            f"layer {layer} has keys {_numbers(key)} and values {_numbers(value)}; a cartridge "
            "needs keys and values of one size; fix: use a model that has them"
        )
    for name, given in others.items():
        if name not in HARMLESS:
            raise ConfigError(
                f"layer {layer} hands the argument {name!r} ({_shown(given)}) to its attention, "
                "which is not known here and would be left out; fix: use a model without it"
            )
        harmless, values = HARMLESS[name]
        if not harmless(given):
            raise ConfigError(
                f"layer {layer} hands {name}={_shown(given)} to its attention; supported is "
                f"{values}; fix: use a model without it"
            )


def _numbers(tensor: Tensor) -> str:
    return f"of {tensor.shape[1]} heads with {tensor.shape[-1]} numbers"


def _shown(given: Any) -> str:
    if isinstance(given, Tensor):
        return f"a tensor {tuple(given.shape)}"
    return f"{given!r:.40}"
