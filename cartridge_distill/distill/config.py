"""The checks a cartridge's settings must pass before anything is loaded.

They work on any object that has the attributes: veRL's `CartridgeConfig`, an OmegaConf node, a
namespace in a test. Checks that need the rest of a run's configuration (the rollout, the batch
sizes) are not here but in `verl_patches.config.checks`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cartridge_distill.cartridge.beginnings import BEGINNINGS
from cartridge_distill.distill.loss import LOSSES, get_loss
from cartridge_distill.distill.mixing import Schedule
from cartridge_distill.model.attention import BACKENDS as ATTENTIONS
from cartridge_distill.sync.versions import is_run_name
from cartridge_distill.util.errors import ConfigError, nearest

INITS = (*BEGINNINGS, "random", "checkpoint")
TRANSPORTS = ("shared_dir", "http")
SYNC_DTYPES = ("auto", "float32", "bfloat16", "float16")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def cartridge_problems(config: Any, where: str = "cartridge") -> list[str]:
    """What is wrong with `config`, one line each: the setting, its value, the fix. Empty when fine.

    Args:
        where: the settings stand in the caller's configuration; messages begin with it.
    """
    problems: list[str] = []

    def refuse(field: str, fix: str) -> None:
        problems.append(f"{where}.{field}={getattr(config, field)!r}: {fix}")

    def at_least(field: str, smallest: int, why: str) -> None:
        value = getattr(config, field)
        if not _is_int(value) or value < smallest:
            refuse(field, f"{why}; fix: set a whole number, {smallest} or more")

    def above_zero(field: str, why: str) -> None:
        value = getattr(config, field)
        # `not (value > 0)` also catches NaN
        if not _is_number(value) or not value > 0 or value == float("inf"):
            refuse(field, f"{why}; fix: set a number above 0")

    def one_of(field: str, known: tuple[str, ...]) -> None:
        if getattr(config, field) not in known:
            refuse(field, f"unknown{nearest(getattr(config, field), known)}")

    at_least("num_tokens", 2, "one frozen and one trained token are the least a cartridge can have")
    at_least("num_frozen_tokens", 1, "Tokasaurus cannot read a cartridge without a frozen token")
    frozen, tokens = config.num_frozen_tokens, config.num_tokens
    if _is_int(frozen) and _is_int(tokens) and frozen >= tokens >= 2:
        refuse(
            "num_frozen_tokens",
            f"nothing is left to train of num_tokens={tokens}; fix: set it below {tokens} (1 is "
            "usual)",
        )
    above_zero("lr", "the cartridge would not learn")
    decay = config.lr_decay_to
    if decay is not None and (not _is_number(decay) or not 0 <= decay <= 1):
        refuse(
            "lr_decay_to", "a part of the rate; fix: set a number from 0 to 1, or null for no decay"
        )
    one_of("init", INITS)
    if config.init == "checkpoint" and not config.checkpoint_path:
        refuse(
            "checkpoint_path",
            "init=checkpoint needs one; fix: give a .pt file, a directory or a hub id",
        )
    if config.init != "checkpoint" and config.checkpoint_path:
        refuse(
            "checkpoint_path",
            f"would be ignored with init={config.init}; "
            f"fix: set {where}.init=checkpoint, or {where}.checkpoint_path=null",
        )
    if not isinstance(config.document_key, str) or not config.document_key:
        refuse(
            "document_key",
            "is no name; fix: name the key in extra_info that holds the document's id",
        )
    one_of("loss", tuple(LOSSES))
    if config.loss in LOSSES:
        try:
            get_loss(config.loss, config.loss_weight)
        except ConfigError as error:
            refuse("loss_weight", str(error).partition(f"{config.loss_weight!r}")[2].lstrip(": "))
    at_least("skip_first_tokens", 0, "the first so many tokens of an answer have no loss")
    if config.max_token_loss is not None:  # null has no bound
        above_zero("max_token_loss", "no token would have a gradient")
    at_least("topk", 1, "the loss compares the teacher's k likeliest tokens (20 is usual)")
    above_zero("kl_temperature", "logits are divided by it (1.0 leaves them alone)")
    one_of("attention", ATTENTIONS)
    at_least("teacher_cache_documents", 1, "the teacher needs the document it is reading")
    at_least("teacher_cache_prompt_mib", 0, "MiB of prompts' KV that the teacher keeps (0: none)")
    at_least("eval_own_text_tokens", 0, "tokens of the cartridge's own answers (0: none)")
    if config.max_logprob_diff is not None:  # null compares with the trainer's own rounding
        above_zero("max_logprob_diff", "every step would be refused (1e-3 suits float32)")
    at_least("async_steps", 0, "batches of rollouts asked for ahead; 0 is strictly on-policy")
    if _is_int(config.async_steps) and config.async_steps > 0 and config.max_staleness:
        refuse(
            "async_steps",
            f"with max_staleness={config.max_staleness!r} a rollout's age would have two causes "
            "and two bounds; fix: set one of them to 0",
        )
    fraction = config.async_check_fraction
    if not _is_number(fraction) or not 0 < fraction <= 1:
        refuse(
            "async_check_fraction", "no rollout would be proven; fix: set a number above 0, up to 1"
        )
    try:
        Schedule.of(config.on_policy_fraction)
    except ConfigError as error:
        refuse("on_policy_fraction", str(error))
    temperature = config.teacher_temperature
    if temperature is not None and (
        not _is_number(temperature) or not 0 <= temperature < float("inf")
    ):
        refuse(
            "teacher_temperature",
            "is no temperature; fix: set a number, 0 (greedy) or more, or null (the rollout's)",
        )
    if config.teacher_cache is not None and Path(str(config.teacher_cache)).expanduser().is_file():
        refuse("teacher_cache", "is a file; fix: name a directory, or null to keep no answers")
    one_of("transport", TRANSPORTS)
    at_least("sync_keep", 1, "the version being sampled must stay")
    one_of("sync_dtype", SYNC_DTYPES)
    if config.run_name is not None and not is_run_name(str(config.run_name)):
        refuse("run_name", "version ids start with it; fix: use letters, digits and single - or _")
    at_least("seed", 0, "torch wants a seed of 0 or more")
    return problems


def check_cartridge_config(config: Any) -> None:
    """Refuse a cartridge configuration that makes no sense.

    Raises:
        ConfigError: every problem found, each with its name, its value and the fix.
    """
    problems = cartridge_problems(config)
    if problems:
        raise ConfigError("\n".join(["the cartridge cannot be trained like this:", *problems]))
