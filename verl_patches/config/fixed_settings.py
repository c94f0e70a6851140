"""veRL's settings that a cartridge run has in one way only: each with the reason for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_patches.hooks import TRAINER_MODE

ACTOR = "actor_rollout_ref.actor"
MODEL = "actor_rollout_ref.model"
ROLLOUT = "actor_rollout_ref.rollout"

FIXED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    # (key, values that work, why no other does)
    (
        f"{MODEL}.use_remove_padding",
        (False,),
        "veRL's packing lets samples see each other through the cartridge and says nothing; "
        "the cartridge engine packs by seq_ids itself",
    ),
    (f"{MODEL}.use_fused_kernels", (False,), "they replace the forward that reads the cartridge"),
    (f"{MODEL}.use_liger", (False, None), "it replaces the forward that reads the cartridge"),
    (f"{MODEL}.lora_rank", (0, None), "the model stays frozen, the cartridge is what is trained"),
    (f"{MODEL}.lora.rank", (0, None), "the model stays frozen, the cartridge is what is trained"),
    (f"{MODEL}.lora_adapter_path", (None,), "server, student and teacher share the bare model"),
    (
        f"{ACTOR}.strategy",
        ("fsdp2",),
        "several ranks shard the frozen base with FSDP2 (FSDP1 cannot run on a CPU)",
    ),
    (
        f"{ACTOR}.fsdp_config.mixed_precision",
        (None,),
        "the base computes in fsdp_config.model_dtype; cartridge, gradients and optimizer state "
        "are float32",
    ),
    (f"{ACTOR}.fsdp_config.offload_policy", (False,), "the frozen base stays on the device"),
    (
        f"{ACTOR}.optim.optimizer_impl",
        ("torch.optim",),
        "the optimizer's state is kept in float32 and saved as plain tensors",
    ),
    (
        f"{ACTOR}.ulysses_sequence_parallel_size",
        (1,),
        "a packed row with a prefix cannot be cut across ranks",
    ),
    (
        f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size",
        (1, None),
        "a packed row with a prefix cannot be cut across ranks",
    ),
    (f"{ACTOR}.ppo_epochs", (1,), "the second pass over a batch would be off-policy"),
    (f"{ACTOR}.use_kl_loss", (False,), "it starts a reference model that nothing needs"),
    ("algorithm.use_kl_in_reward", (False,), "it starts a reference model that nothing needs"),
    ("reward.reward_model.enable", (False,), "there is no reward, the loss is the teacher's KL"),
    (
        "distillation.enabled",
        (False, None),
        "it starts a second model as teacher; here the teacher is the student's own model",
    ),
    (
        "trainer.resume_mode",
        ("auto", "disable", "resume_path"),
        "veRL knows no other",
    ),
    ("trainer.default_hdfs_dir", (None,), "checkpoints go to trainer.default_local_dir alone"),
    (
        "trainer.del_local_ckpt_after_load",
        (False, None),
        "a run that dies before its next save could not go on",
    ),
    (
        "trainer.remove_previous_ckpt_in_save",
        (False, None),
        "veRL deprecates it; trainer.max_actor_ckpt_to_keep says how many stay",
    ),
    (f"{ACTOR}.checkpoint.async_save", (False, None), "a cartridge is written in a moment"),
    (f"{ACTOR}.fsdp_config.param_offload", (False,), "the frozen base stays on the device"),
    (f"{ACTOR}.fsdp_config.optimizer_offload", (False,), "the cartridge's state is megabytes"),
    ("trainer.use_v1", (True,), "the cartridge trainer is a v1 trainer"),
    ("trainer.v1.trainer_mode", (TRAINER_MODE,), "no other trainer refuses stale rollouts"),
    (f"{ROLLOUT}.name", ("tokasaurus",), "no other rollout sends the cartridge"),
    (f"{ROLLOUT}.tensor_model_parallel_size", (1,), "the server is not part of this job"),
    (f"{ROLLOUT}.data_parallel_size", (1,), "the server is not part of this job"),
    (f"{ROLLOUT}.pipeline_model_parallel_size", (1,), "the server is not part of this job"),
    (
        f"{ROLLOUT}.calculate_log_probs",
        (True,),
        "server and trainer log-probs are compared at every step",
    ),
    (f"{ROLLOUT}.top_p", (1, 1.0), "Tokasaurus refuses any other value"),
    (f"{ROLLOUT}.top_k", (-1, 0), "Tokasaurus has no top-k sampling"),
    (f"{ROLLOUT}.val_kwargs.top_p", (1, 1.0, None), "Tokasaurus refuses any other value"),
    (f"{ROLLOUT}.val_kwargs.top_k", (-1, 0, None), "Tokasaurus has no top-k sampling"),
    (
        f"{ROLLOUT}.checkpoint_engine.backend",
        ("naive",),
        "the weight update carries the cartridge to the rollout adapter, which publishes it",
    ),
    (
        "data.truncation",
        ("error",),
        "a prompt over the limit must be an error, never cut",
    ),
    (
        "data.filter_overlong_prompts",
        (False, None),
        "it counts with another rendering, of a template's own system prompt, and drops rows that "
        "fit; `prepare --prompt-tokens` writes none that is too long",
    ),
    (
        "trainer.val_only",
        (False, None),
        "nothing would be trained; `cartridge-distill eval` evaluates a cartridge",
    ),
)


def fixed_problems(config: DictConfig) -> Iterator[str]:
    """What has another value than one that works, with the reason and the fix."""
    for key, allowed, why in FIXED:
        value = OmegaConf.select(config, key, default=None)
        # `0 == False` in Python, and use_remove_padding=0 means what it says; a string does not
        if value not in allowed:
            yield f"{key}={value!r}: {why}; fix: set {key}={_spell(allowed[0])}"


def _spell(value: Any) -> str:
    """`value` as it is written on Hydra's command line."""
    return "null" if value is None else str(value)
