"""Refuses veRL configurations that would run with a cartridge and be wrong, or fail much later.

Called by veRL's own `validate_config` (config/validate.patch) in the driver, before Ray starts.
All problems are named at once. Settings that merely cost speed are left to the user, and what
only a worker can know (does the server answer, does the document fit) is checked there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cartridge_distill.cartridge.kv_shape import PAGE_TOKENS
from cartridge_distill.distill.config import cartridge_problems
from cartridge_distill.util.errors import ConfigError, with_fix
from cartridge_distill.util.pasting import hydra_value, shell_quoted
from cartridge_distill.util.server_url import checked_url
from verl_patches.config.data_files import problem
from verl_patches.config.fixed_settings import ACTOR, MODEL, ROLLOUT, fixed_problems
from verl_patches.config.run_length import BATCH, data_files, run_length
from verl_patches.config.unread_settings import unread_problems
from verl_patches.platform.cluster import joins_a_cluster

MIN_RAY_CPUS = 4

KEY = f"{ACTOR}.cartridge"  # where the settings that the core checks stand


def _get(config: DictConfig, key: str) -> Any:
    return OmegaConf.select(config, key, default=None)


def _batch_problems(config: DictConfig) -> Iterator[str]:
    batch = _get(config, "data.train_batch_size")
    mini = _get(config, f"{ACTOR}.ppo_mini_batch_size")
    count = _get(config, f"{ROLLOUT}.n")
    staleness, ahead = (_get(config, f"{KEY}.{name}") for name in ("max_staleness", "async_steps"))
    yield from _mini_batch_problems(batch, mini, staleness, ahead)
    ranks = (_get(config, "trainer.nnodes") or 1) * (_get(config, "trainer.n_gpus_per_node") or 1)
    if not isinstance(count, int) or count < 1:
        yield f"{ROLLOUT}.n={count!r}: rollouts per prompt; fix: set a whole number, 1 or more"
    elif isinstance(mini, int) and (mini * count) % ranks:
        yield (
            f"{ACTOR}.ppo_mini_batch_size={mini} x {ROLLOUT}.n={count} samples on {ranks} ranks "
            "(trainer.nnodes x trainer.n_gpus_per_node): veRL would fill up with samples that have "
            f"no document; fix: make the product a multiple of {ranks}"
        )
    temperature = _get(config, f"{ROLLOUT}.temperature")
    if not isinstance(temperature, int | float) or not temperature > 0:
        yield (
            f"{ROLLOUT}.temperature={temperature!r}: log-probs are of logits divided by it; "
            "fix: set a number above 0 (0.7 is usual)"
        )


def _mini_batch_problems(batch: Any, mini: Any, staleness: Any, ahead: Any) -> Iterator[str]:
    if isinstance(staleness, bool) or not isinstance(staleness, int) or staleness < 0:
        yield (
            f"{KEY}.max_staleness={staleness!r}: optimizer steps on one batch after the first; "
            "fix: set a whole number, 0 (strictly on-policy) or more"
        )
        return
    key = f"{ACTOR}.ppo_mini_batch_size"
    if not isinstance(mini, int) or not isinstance(batch, int) or mini < 1 or batch % mini:
        yield (
            f"{key}={mini!r}: no whole part of data.train_batch_size={batch!r}; fix: set it to one"
        )
    elif batch // mini > staleness + 1:
        otherwise = f"{KEY}.max_staleness={batch // mini - 1}"
        if ahead:
            otherwise += f" and {KEY}.async_steps=0"
        yield (
            f"{key}={mini!r}: {batch // mini} optimizer steps on one batch of rollouts, the last "
            f"of them {batch // mini - 1} steps off-policy; fix: set it to "
            f"data.train_batch_size={batch!r}, or allow that with {otherwise}"
        )


def _run_length_problems(config: DictConfig) -> Iterator[str]:
    for split in ("train", "val"):
        for name in data_files(config, split):
            if found := problem(f"data.{split}_files", name):
                yield found
    try:
        yield from run_length(config).problems()
    except ConfigError as error:
        yield str(error)
    generated, batch = _get(config, "data.gen_batch_size"), _get(config, BATCH)
    if generated not in (None, batch):
        yield (
            f"data.gen_batch_size={generated!r}: a step takes {BATCH}={batch!r} prompts; fix: "
            "remove it"
        )


def _saving_problems(config: DictConfig) -> Iterator[str]:
    key = "trainer.max_actor_ckpt_to_keep"
    keep = _get(config, key)
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        yield f"{key}={keep!r}: checkpoints that stay; fix: set a whole number, 1 or more, or null"


def _rate_problems(config: DictConfig) -> Iterator[str]:
    key, kind = f"{KEY}.lr_decay_to", f"{ACTOR}.optim.lr_scheduler_type"
    decay, scheduler = _get(config, key), _get(config, kind)
    if decay is not None and scheduler != "constant":
        yield (
            f"{key}={decay!r} with {kind}={scheduler!r}: two schedules for one rate; fix: set "
            f"{kind}=constant, or {key}=null"
        )


def _cluster_problems(config: DictConfig) -> Iterator[str]:
    key = "trainer.default_local_dir"
    folder = str(_get(config, key))
    if joins_a_cluster(config) and not Path(folder).expanduser().is_absolute():
        yield (
            f"{key}={folder!r}: a cluster's workers run in other folders than this process; fix: "
            "set "
            + shell_quoted(f"{key}={hydra_value(Path(folder).absolute())}")
            + ", on a disk that all nodes share"
        )


def _length_problems(config: DictConfig) -> Iterator[str]:
    lengths = []
    for data_key, rollout_key in (
        ("data.max_prompt_length", f"{ROLLOUT}.prompt_length"),
        ("data.max_response_length", f"{ROLLOUT}.response_length"),
    ):
        length, mirrored = _get(config, data_key), _get(config, rollout_key)
        if not isinstance(length, int) or length < 1:
            yield f"{data_key}={length!r}: no number of tokens; fix: set a whole one, 1 or more"
            return
        if mirrored is not None and mirrored != length:
            yield f"{rollout_key}={mirrored!r}: differs from {data_key}={length!r}; fix: remove it"
        lengths.append(length)
    tokens, context = _get(config, f"{KEY}.num_tokens"), _model_context(config)
    if context is not None and isinstance(tokens, int) and tokens + sum(lengths) > context:
        yield (
            f"{KEY}.num_tokens={tokens} + data.max_prompt_length={lengths[0]} + "
            f"data.max_response_length={lengths[1]} = {tokens + sum(lengths)} tokens, the model's "
            f"context is {context}; fix: make one of them smaller"
        )


def _model_context(config: DictConfig) -> int | None:
    """Positions the model was made for, when the model is a local folder; None when unknown."""
    path = _get(config, f"{MODEL}.path")
    file = Path(str(path)).expanduser() / "config.json"
    if not path or not file.is_file():
        return None  # a hub id: known when the model is loaded
    model_config = json.loads(file.read_text(encoding="utf-8"))
    model_config = model_config.get("text_config", model_config)
    context = model_config.get("max_position_embeddings")
    return context if isinstance(context, int) else None


def _server_problems(config: DictConfig) -> Iterator[str]:
    key = f"{ROLLOUT}.custom.tokasaurus_url"
    urls = _get(config, key)
    if not urls:
        yield (
            f"{key}={urls!r}: no inference server; "
            "fix: set its base URL, e.g. http://127.0.0.1:10210, or a list of them"
        )
        urls = []
    for url in [urls] if isinstance(urls, str) else urls:
        try:
            checked_url(str(url))
        except ConfigError as error:
            shown = "" if "@" in str(url) else f"={url!r}"  # a password is not repeated
            yield with_fix(f"{key}{shown}: {error}", "set a URL with http:// or https://")
    if fixed := _get(config, f"{ROLLOUT}.custom.cartridges"):
        yield (
            f"{ROLLOUT}.custom.cartridges={OmegaConf.to_container(fixed)!r}: the server would join"
            " fixed cartridges to the trained one, the trainer's forward would not have them; "
            "fix: set it to []"
        )
    tokens = _get(config, f"{KEY}.num_tokens")
    if isinstance(tokens, int) and tokens % PAGE_TOKENS:
        near = max(PAGE_TOKENS, round(tokens / PAGE_TOKENS) * PAGE_TOKENS)
        yield (
            f"{KEY}.num_tokens={tokens}: the server's model process dies unless it is a multiple "
            f"of its page size, {PAGE_TOKENS}; fix: set {near}, the nearest"
        )
    if _get(config, f"{KEY}.transport") == "shared_dir" and not _get(config, f"{KEY}.sync_dir"):
        yield (
            f"{KEY}.sync_dir=None: new cartridge versions have nowhere to go; "
            "fix: set the server's cartridge directory as this machine sees it, or "
            f"{KEY}.transport=http to upload to a gateway"
        )


def _document_problems(config: DictConfig) -> Iterator[str]:
    documents = _get(config, f"{KEY}.documents")
    fix = "fix: set the documents file that `cartridge-distill prepare` wrote beside the prompts"
    if not documents:
        yield f"{KEY}.documents=None: the teacher has nothing to read; {fix}"
    elif not Path(str(documents)).expanduser().is_file():
        where = Path(str(documents)).expanduser().absolute()
        yield f"{KEY}.documents={str(documents)!r}: there is no file {where}; {fix}"


def _validation_problems(config: DictConfig) -> Iterator[str]:
    key = f"{KEY}.eval_questions"
    every, first = _get(config, "trainer.test_freq"), _get(config, "trainer.val_before_train")
    if isinstance(every, bool) or not isinstance(every, int):
        yield (
            f"trainer.test_freq={every!r}: steps between validations; fix: set a whole number, "
            "-1 for none"
        )
        return
    questions = _get(config, key)
    fix = "fix: set the eval.json that `cartridge-distill prepare` wrote beside the prompts"
    if questions is None:
        for name, value, off in (
            ("test_freq", every if every > 0 else None, "-1"),
            ("val_before_train", first or None, "False"),
        ):
            if value is not None:
                yield (
                    f"trainer.{name}={value!r} with {key}=None: there is nothing to validate on; "
                    f"{fix}, or trainer.{name}={off}"
                )
    elif not Path(str(questions)).expanduser().is_file():
        where = Path(str(questions)).expanduser().absolute()
        yield f"{key}={str(questions)!r}: there is no file {where}; {fix}"


def _critic_problems(config: DictConfig) -> Iterator[str]:
    enabled, estimator = _get(config, "critic.enable"), _get(config, "algorithm.adv_estimator")
    # veRL's need_critic: null means "when the advantage estimator is gae", its default
    if enabled or (enabled is None and estimator == "gae"):
        yield (
            f"critic.enable={enabled!r} with algorithm.adv_estimator={estimator!r}: "
            "there is no reward to criticise; fix: set critic.enable=False"
        )


def _machine_problems(config: DictConfig) -> Iterator[str]:
    key = "ray_kwargs.ray_init.num_cpus"
    cpus = _get(config, key)
    if joins_a_cluster(config):
        if cpus is not None:
            yield (
                f"{key}={cpus!r}: the run joins a Ray cluster that is there already, and that has "
                f"the CPUs it was started with; fix: set {key}=null"
            )
        return
    if cpus is None:
        cpus = os.cpu_count()  # what Ray takes when it starts a cluster of its own
    if isinstance(cpus, int) and cpus < MIN_RAY_CPUS:
        yield (
            f"{key}={_get(config, key)!r} (Ray would have {cpus}): veRL's data queue takes several "
            f"and hangs silently for want of one; they are only counted, not used up; "
            f"fix: set {key}=8 whatever the machine has"
        )


def check_run_config(config: DictConfig) -> None:
    """Refuse a whole veRL configuration that cannot train a cartridge.

    Args:
        config: veRL's resolved or unresolved configuration, with actor.cartridge.enabled true.

    Raises:
        ConfigError: every problem found, each with its key, its value and the fix.
    """
    problems = [
        *cartridge_problems(_get(config, KEY), KEY),
        *fixed_problems(config),
        *unread_problems(config),
        *_batch_problems(config),
        *_run_length_problems(config),
        *_rate_problems(config),
        *_saving_problems(config),
        *_length_problems(config),
        *_server_problems(config),
        *_document_problems(config),
        *_validation_problems(config),
        *_critic_problems(config),
        *_machine_problems(config),
        *_cluster_problems(config),
    ]
    if problems:
        raise ConfigError("\n- ".join(["this configuration cannot train a cartridge:", *problems]))
