"""veRL's settings that no part of a cartridge run reads: refused where they were changed.

veRL's configuration has them for every kind of training. Whoever changes one expects another run,
and would get the same one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from verl_patches.config.fixed_settings import ACTOR, ROLLOUT

_ADVANTAGES = "no advantages are computed, the loss is the divergence to the teacher"
_PPO = "the loss is no policy gradient; actor.cartridge.loss names it"
_VALIDATION = "a validation draws nothing at random"
_NO_SCORES = "it writes rewards, and there are none; the run's folder holds what was measured"

UNREAD: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    # (key, values that change nothing: veRL's default first, why no other is read)
    ("algorithm.gamma", (1.0,), _ADVANTAGES),
    ("algorithm.lam", (1.0,), _ADVANTAGES),
    ("algorithm.norm_adv_by_std_in_grpo", (True,), _ADVANTAGES),
    ("algorithm.use_pf_ppo", (False,), _ADVANTAGES),
    ("algorithm.filter_groups.enable", (False,), "it filters by rewards, and there are none"),
    ("algorithm.rollout_correction.rollout_is", (None,), _PPO),
    ("algorithm.rollout_correction.rollout_rs", (None,), _PPO),
    ("algorithm.rollout_correction.bypass_mode", (False,), _PPO),
    (f"{ACTOR}.clip_ratio", (0.2,), _PPO),
    (f"{ACTOR}.clip_ratio_low", (0.2,), _PPO),
    (f"{ACTOR}.clip_ratio_high", (0.2,), _PPO),
    (f"{ACTOR}.clip_ratio_c", (3.0,), _PPO),
    (f"{ACTOR}.policy_loss.loss_mode", ("vanilla",), _PPO),
    (f"{ACTOR}.entropy_coeff", (0,), _PPO),
    (f"{ACTOR}.calculate_entropy", (False,), "the student's entropy is logged at every step"),
    (f"{ACTOR}.loss_agg_mode", ("token-mean",), "the loss is the mean over a step's tokens"),
    (f"{ACTOR}.loss_scale_factor", (None,), "the loss is the mean over a step's tokens"),
    (f"{ACTOR}.use_prefix_grouper", (False,), "the engine packs prompts itself"),
    (f"{ACTOR}.qat.enable", (False,), "the base is frozen"),
    (f"{ROLLOUT}.ignore_eos", (False,), "an answer ends where the model ends it"),
    (f"{ROLLOUT}.do_sample", (True,), f"{ROLLOUT}.temperature says how answers are drawn"),
    (f"{ROLLOUT}.over_sample_rate", (0,), "each prompt is answered as often as rollout.n says"),
    (f"{ROLLOUT}.multi_turn.enable", (False,), "an answer is one turn; prompts may hold several"),
    (f"{ROLLOUT}.val_kwargs.temperature", (0,), _VALIDATION),
    (f"{ROLLOUT}.val_kwargs.do_sample", (False,), _VALIDATION),
    (f"{ROLLOUT}.val_kwargs.n", (1,), _VALIDATION),
    (
        "data.apply_chat_template_kwargs",
        ({},),
        "server, student and teacher render prompts by the template's defaults; write what it "
        "should say into the template of the model's folder",
    ),
    ("trainer.critic_warmup", (0,), "there is no critic, and each step trains the cartridge"),
    ("trainer.log_val_generations", (0,), _VALIDATION),
    ("trainer.rollout_data_dir", (None,), _NO_SCORES),
    ("trainer.validation_data_dir", (None,), _NO_SCORES),
)


def unread_problems(config: DictConfig) -> Iterator[str]:
    """What was changed and would change nothing, with the reason."""
    for key, allowed, why in UNREAD:
        value = OmegaConf.select(config, key, default=None)
        if isinstance(value, DictConfig | ListConfig):
            value = OmegaConf.to_container(value)
        if value is not None and value not in allowed:
            yield f"{key}={value!r}: nothing reads it here: {why}; fix: remove it"
