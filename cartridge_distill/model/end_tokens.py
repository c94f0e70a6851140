"""With which tokens a server may end an answer of a model."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from cartridge_distill.cartridge.kv_shape import text_config


def possible_end_ids(model: str) -> frozenset[int]:
    """All ids that the model's files call an end: a server takes some of them, or all.

    Servers look in different files, and nobody asks them which. So this is the largest set.

    Args:
        model: folder or hub id.

    Returns:
        Empty where no file names any.
    """
    named: list[Any] = [text_config(AutoConfig.from_pretrained(model)).eos_token_id]
    try:
        named.append(GenerationConfig.from_pretrained(model).eos_token_id)
    except OSError:
        pass  # the model has no such file; servers then look elsewhere, too
    named.append(AutoTokenizer.from_pretrained(model).eos_token_id)
    ids = [i for entry in named for i in (entry if isinstance(entry, list) else [entry])]
    return frozenset(i for i in ids if i is not None)
