"""What is refused when veRL reads the configuration, and that the fix is in the message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from cartridge_distill.distill import config as core_config
from cartridge_distill.distill.config import check_cartridge_config
from cartridge_distill.util.errors import ConfigError
from verl_patches.config.checks import check_run_config

CARTRIDGE = "actor_rollout_ref.actor.cartridge"
ROLLOUT = "actor_rollout_ref.rollout"
MODEL = "actor_rollout_ref.model"
ACTOR = "actor_rollout_ref.actor"

Compose = Callable[..., DictConfig]


@pytest.fixture(scope="module")
def base(patched: Path, tmp_path_factory: pytest.TempPathFactory) -> DictConfig:
    """veRL's own ppo_trainer with the overrides that a cartridge needs, none with a `+`."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "documents.parquet").write_bytes(b"")
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps({"max_position_embeddings": 8192}))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(patched / "verl/trainer/config"), version_base=None):
        return compose(
            "ppo_trainer",
            overrides=[
                f"{CARTRIDGE}.enabled=True",
                f"{CARTRIDGE}.documents={folder / 'documents.parquet'}",
                f"{CARTRIDGE}.sync_dir={folder / 'cartridges'}",
                f"{CARTRIDGE}.max_logprob_diff=1e-3",
                f"{ROLLOUT}.name=tokasaurus",
                f"{ROLLOUT}.custom.tokasaurus_url=http://127.0.0.1:10210",
                f"{ROLLOUT}.tensor_model_parallel_size=1",
                f"{MODEL}.path={folder / 'model'}",
                f"{MODEL}.use_remove_padding=False",
                f"{MODEL}.enable_gradient_checkpointing=False",
                f"{ACTOR}.strategy=fsdp2",
                f"{ACTOR}.ppo_mini_batch_size=8",
                "data.train_batch_size=8",
                "trainer.v1.trainer_mode=cartridge",
                "trainer.n_gpus_per_node=1",
                "trainer.val_before_train=False",
                "critic.enable=False",
                "ray_kwargs.ray_init.num_cpus=8",
            ],
        )


def changed(base: DictConfig, key: str, value: Any) -> DictConfig:
    config = base.copy()
    OmegaConf.update(config, key, value, force_add=True)  # a mapping may have keys of its own
    return config


def test_a_good_configuration_passes(base: DictConfig) -> None:
    check_run_config(base)


def test_validation_takes_a_file_of_questions(base: DictConfig, tmp_path: Path) -> None:
    config = changed(base, "trainer.test_freq", 5)
    with pytest.raises(ConfigError, match=r"eval_questions=None: there is nothing to validate on"):
        check_run_config(config)
    (tmp_path / "eval.json").write_text("[]")
    check_run_config(changed(config, f"{CARTRIDGE}.eval_questions", str(tmp_path / "eval.json")))


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        (f"{MODEL}.use_remove_padding", True, f"set {MODEL}.use_remove_padding=False"),
        (f"{MODEL}.lora_rank", 8, f"set {MODEL}.lora_rank=0"),
        (f"{MODEL}.use_fused_kernels", True, f"set {MODEL}.use_fused_kernels=False"),
        (f"{CARTRIDGE}.topk", 0, "set a whole number, 1 or more"),
        (f"{CARTRIDGE}.on_policy_fraction", -0.5, "set a number from 0 to 1"),
        (f"{CARTRIDGE}.on_policy_fraction", "half", "[step, fraction] pairs"),
        (f"{CARTRIDGE}.on_policy_fraction", [[8, 0.5], [4, 1.0]], "fix: let the steps increase"),
        (f"{CARTRIDGE}.num_frozen_tokens", 4096, "set it below 2048"),
        (f"{CARTRIDGE}.num_frozen_tokens", 0, "set a whole number, 1 or more"),
        (f"{CARTRIDGE}.num_tokens", 100, "fix: set 96, the nearest"),
        (f"{CARTRIDGE}.num_tokens", 8000, "the model's context is 8192"),
        (f"{CARTRIDGE}.documents", None, "`cartridge-distill prepare`"),
        (f"{CARTRIDGE}.documents", "no/such/file.parquet", "there is no file"),
        (f"{CARTRIDGE}.sync_dir", None, "set the server's cartridge directory"),
        (f"{ROLLOUT}.name", "vllm", f"set {ROLLOUT}.name=tokasaurus"),
        (f"{ROLLOUT}.custom.tokasaurus_url", None, "http://127.0.0.1:10210"),
        (f"{ROLLOUT}.custom.tokasaurus_url", "localhost:10210", "http:// or https://"),
        (f"{ROLLOUT}.custom", None, "http://127.0.0.1:10210"),
        (f"{ROLLOUT}.top_p", 0.9, f"set {ROLLOUT}.top_p=1"),
        (f"{ROLLOUT}.top_k", 50, f"set {ROLLOUT}.top_k=-1"),
        (f"{ROLLOUT}.n", 0, "1 or more"),
        (f"{ROLLOUT}.temperature", 0.0, "above 0"),
        (f"{ROLLOUT}.calculate_log_probs", False, f"set {ROLLOUT}.calculate_log_probs=True"),
        (f"{ROLLOUT}.tensor_model_parallel_size", 2, "tensor_model_parallel_size=1"),
        (f"{ROLLOUT}.prompt_length", 7, "differs from data.max_prompt_length"),
        (f"{ACTOR}.ppo_epochs", 2, f"set {ACTOR}.ppo_epochs=1"),
        (f"{ACTOR}.ppo_mini_batch_size", 4, "set it to data.train_batch_size=8"),
        (f"{ACTOR}.ulysses_sequence_parallel_size", 2, "ulysses_sequence_parallel_size=1"),
        (f"{ACTOR}.strategy", "megatron", f"set {ACTOR}.strategy=fsdp2"),
        (f"{ACTOR}.strategy", "fsdp", f"set {ACTOR}.strategy=fsdp2"),
        (f"{ACTOR}.fsdp_config.offload_policy", True, "offload_policy=False"),
        (f"{ACTOR}.optim.optimizer_impl", "bitsandbytes.optim", "optimizer_impl=torch.optim"),
        (f"{ACTOR}.checkpoint.async_save", True, "async_save=False"),
        (f"{ACTOR}.use_kl_loss", True, f"set {ACTOR}.use_kl_loss=False"),
        (f"{ROLLOUT}.custom.cartridges", [{"id": "other"}], "set it to []"),
        (f"{ACTOR}.fsdp_config.param_offload", True, "param_offload=False"),
        ("trainer.resume_mode", "always", "set trainer.resume_mode=auto"),
        ("trainer.default_hdfs_dir", "hdfs://x", "set trainer.default_hdfs_dir=null"),
        ("trainer.del_local_ckpt_after_load", True, "del_local_ckpt_after_load=False"),
        ("trainer.max_actor_ckpt_to_keep", 0, "1 or more, or null"),
        (f"{CARTRIDGE}.max_staleness", -1, "0 (strictly on-policy) or more"),
        (f"{ACTOR}.ppo_mini_batch_size", 3, "whole part of data.train_batch_size=8; fix: "),
        ("trainer.test_freq", 5, "trainer.test_freq=-1"),
        ("trainer.test_freq", "often", "a whole number, -1 for none"),
        ("trainer.val_before_train", True, "trainer.val_before_train=False"),
        (f"{CARTRIDGE}.eval_questions", "nowhere/eval.json", "there is no file"),
        ("trainer.use_v1", False, "set trainer.use_v1=True"),
        ("trainer.v1.trainer_mode", "sync", "set trainer.v1.trainer_mode=cartridge"),
        ("critic.enable", True, "set critic.enable=False"),
        ("critic.enable", None, "set critic.enable=False"),
        ("reward.reward_model.enable", True, "set reward.reward_model.enable=False"),
        ("distillation.enabled", True, "set distillation.enabled=False"),
        ("data.max_response_length", 0, "1 or more"),
        ("data.truncation", "left", "set data.truncation=error"),
        ("algorithm.gamma", 0.9, "nothing reads it here"),
        ("algorithm.filter_groups.enable", True, "nothing reads it here"),
        (f"{ACTOR}.entropy_coeff", 0.01, "actor.cartridge.loss names it"),
        (f"{ACTOR}.loss_agg_mode", "seq-mean-token-mean", "the mean over a step's tokens"),
        (f"{ROLLOUT}.ignore_eos", True, "an answer ends where the model ends it"),
        (f"{ROLLOUT}.do_sample", False, "temperature says how"),
        (f"{ROLLOUT}.val_kwargs.n", 4, "nothing reads it here"),
        ("data.apply_chat_template_kwargs", {"enable_thinking": False}, "the template's defaults"),
        ("trainer.critic_warmup", 5, "each step trains the cartridge"),
        ("trainer.rollout_data_dir", "rollouts", "there are none"),
        ("ray_kwargs.ray_init.num_cpus", 2, "set ray_kwargs.ray_init.num_cpus=8"),
    ],
)
def test_nonsense_is_refused_with_key_value_and_fix(
    base: DictConfig, key: str, value: Any, fix: str
) -> None:
    config = changed(base, key, value)
    with pytest.raises(ConfigError) as caught:
        check_run_config(config)
    message = str(caught.value)
    named = [line for line in message.splitlines() if key in line]
    assert named, message
    assert any(fix in line for line in named), message
    assert any(repr(value) in line for line in named) or value is None, message


@pytest.mark.parametrize("mode", ["auto", "disable", "resume_path"])
def test_every_way_to_resume_is_free(base: DictConfig, mode: str) -> None:
    check_run_config(changed(base, "trainer.resume_mode", mode))


def test_two_steps_on_a_batch_must_be_asked_for(base: DictConfig) -> None:
    half = changed(base, f"{ACTOR}.ppo_mini_batch_size", 4)
    with pytest.raises(ConfigError, match=f"allow that with {CARTRIDGE}.max_staleness=1"):
        check_run_config(half)
    check_run_config(changed(half, f"{CARTRIDGE}.max_staleness", 1))


def test_rollouts_ahead_are_one_cause_of_staleness_and_steps_on_a_batch_another(
    base: DictConfig,
) -> None:
    ahead = changed(base, f"{CARTRIDGE}.async_steps", 2)
    check_run_config(ahead)
    half = changed(ahead, f"{ACTOR}.ppo_mini_batch_size", 4)
    with pytest.raises(ConfigError, match=f"max_staleness=1 and {CARTRIDGE}.async_steps=0"):
        check_run_config(half)
    with pytest.raises(ConfigError, match="async_steps=2: with max_staleness=1 .* two causes"):
        check_run_config(changed(half, f"{CARTRIDGE}.max_staleness", 1))


def test_samples_must_divide_over_the_ranks(base: DictConfig) -> None:
    check_run_config(changed(base, "trainer.n_gpus_per_node", 4))
    with pytest.raises(ConfigError, match="make the product a multiple of 3"):
        check_run_config(changed(base, "trainer.n_gpus_per_node", 3))
    three = changed(base, "trainer.n_gpus_per_node", 3)
    check_run_config(changed(three, f"{ROLLOUT}.n", 3))


def test_several_servers_may_be_named(base: DictConfig) -> None:
    key = f"{ROLLOUT}.custom.tokasaurus_url"
    check_run_config(changed(base, key, ["http://one:10210", "https://two"]))
    with pytest.raises(ConfigError, match="'two:10210'.*fix: begin it with http://"):
        check_run_config(changed(base, key, ["http://one:10210", "two:10210"]))


def test_dynamic_batch_size_is_free(base: DictConfig) -> None:
    for value in (True, False):
        check_run_config(changed(base, f"{ACTOR}.use_dynamic_bsz", value))


def test_all_problems_are_named_at_once(base: DictConfig) -> None:
    config = changed(changed(base, f"{CARTRIDGE}.topk", 0), "trainer.use_v1", False)
    with pytest.raises(ConfigError) as caught:
        check_run_config(config)
    assert f"{CARTRIDGE}.topk=0" in str(caught.value)
    assert "trainer.use_v1=False" in str(caught.value)


# The core's own checks: any object with the attributes will do.


def settings(**changes: Any) -> SimpleNamespace:
    defaults: dict[str, Any] = dict(
        checkpoint_path=None,
        num_tokens=64,
        num_frozen_tokens=1,
        lr=0.02,
        lr_decay_to=None,
        init="text",
        document_key="document_id",
        loss="forward_kl_topk",
        loss_weight=None,
        skip_first_tokens=0,
        max_token_loss=None,
        topk=20,
        kl_temperature=1.0,
        attention="auto",
        teacher_cache_documents=8,
        teacher_cache_prompt_mib=256,
        eval_own_text_tokens=0,
        max_logprob_diff=1e-3,
        max_staleness=0,
        async_steps=0,
        async_check_fraction=0.25,
        on_policy_fraction=1.0,
        teacher_temperature=None,
        teacher_cache=None,
        transport="shared_dir",
        sync_keep=2,
        sync_dtype="auto",
        run_name=None,
        seed=0,
    )
    return SimpleNamespace(**(defaults | changes))


def test_core_accepts_good_settings() -> None:
    check_cartridge_config(settings())
    check_cartridge_config(settings(init="checkpoint", checkpoint_path="me/cartridge"))
    check_cartridge_config(settings(run_name="demo-seed_1"))
    check_cartridge_config(settings(max_logprob_diff=None))
    check_cartridge_config(settings(loss="kl_mix", loss_weight=0.3, max_token_loss=5.0))
    check_cartridge_config(settings(async_steps=4, async_check_fraction=1))
    check_cartridge_config(settings(lr_decay_to=0.02, on_policy_fraction="cold_start:8"))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_tokens": 1},
        {"num_tokens": 64.0},
        {"num_tokens": True},
        {"num_frozen_tokens": 64},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"lr": "fast"},
        {"init": "zeros"},
        {"init": "checkpoint"},
        {"checkpoint_path": "me/cartridge"},
        {"document_key": ""},
        {"loss": "mse"},
        {"loss_weight": 0.5},
        {"loss_weight": 1.0, "loss": "jensen_shannon"},
        {"skip_first_tokens": -1},
        {"skip_first_tokens": True},
        {"max_token_loss": 0},
        {"max_token_loss": float("inf")},
        {"lr_decay_to": 1.5},
        {"lr_decay_to": float("nan")},
        {"on_policy_fraction": "cold_start:0"},
        {"on_policy_fraction": "warm_start"},
        {"topk": -1},
        {"kl_temperature": 0},
        {"attention": "loop"},
        {"teacher_cache_documents": 0},
        {"teacher_cache_prompt_mib": -1},
        {"teacher_cache_prompt_mib": 0.5},
        {"eval_own_text_tokens": -1},
        {"eval_own_text_tokens": True},
        {"max_logprob_diff": 0},
        {"max_logprob_diff": "auto"},
        {"async_steps": -1},
        {"async_steps": 0.5},
        {"async_steps": 2, "max_staleness": 1},
        {"async_check_fraction": 0},
        {"async_check_fraction": 1.1},
        {"async_check_fraction": "all"},
        {"on_policy_fraction": 1.5},
        {"on_policy_fraction": [[0, 0.0], [0, 1.0]]},
        {"teacher_temperature": -0.1},
        {"teacher_cache": __file__},
        {"transport": "carrier_pigeon"},
        {"sync_keep": 0},
        {"sync_dtype": "int8"},
        {"run_name": "a--b"},
        {"run_name": "../up"},
        {"seed": -1},
    ],
)
def test_core_refuses(changes: dict[str, Any]) -> None:
    field = "checkpoint_path" if changes.get("init") == "checkpoint" else next(iter(changes))
    with pytest.raises(ConfigError, match=f"cartridge.{field}="):
        check_cartridge_config(settings(**changes))


def test_names_agree_with_the_modules_that_implement_them() -> None:
    from cartridge_distill.model.attention import BACKENDS

    assert core_config.ATTENTIONS == BACKENDS


def test_every_field_has_its_yaml_default(patched: Path) -> None:
    """The dataclass and its YAML are two places: they must say the same."""
    import ast

    source = (patched / "verl/workers/config/actor.py").read_text()
    tree = ast.parse(source)
    node = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "CartridgeConfig")
    fields = {
        item.target.id: ast.literal_eval(item.value)
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and item.value is not None
    }
    text = (patched / "verl/trainer/config/actor/actor.yaml").read_text()
    block = yaml.safe_load(text)["cartridge"]
    assert block.pop("_target_") == "verl.workers.config.CartridgeConfig"
    # PyYAML reads 1e-3 as text, OmegaConf as the number it is
    block = {k: float(v) if isinstance(fields[k], float) else v for k, v in block.items()}
    assert block == fields


def test_a_cluster_that_is_there_has_the_cpus_it_has(
    base: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    key = "ray_kwargs.ray_init.num_cpus"
    with pytest.raises(ConfigError, match=f"{key}=8: the run joins .* set {key}=null"):
        check_run_config(base)
    joining = changed(base, key, None)
    where = "trainer.default_local_dir"
    message = f"{where}=.checkpoints.*set {where}=/.*checkpoints"
    with pytest.raises(ConfigError, match=message):
        check_run_config(joining)
    check_run_config(changed(joining, where, "/shared/run"))
