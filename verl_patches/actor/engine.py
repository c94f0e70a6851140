"""veRL's FSDP engine with a cartridge: student forward, teacher forward, KL, step.

The base model is frozen and shared by student and teacher. veRL drives this engine as any other
(``train_mini_batch`` -> ``forward_backward_batch`` -> ``forward_step``); what differs is that the
batch is packed with ``seq_ids``, that only the cartridge has gradients and an optimizer, and that a
step is refused when its rollouts were not made by the cartridge being trained (or, where they are
asked for ahead, by the one they name), or its answers not by the teacher with the document.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from tensordict import TensorDict
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from verl.utils.device import get_device_id
from verl.workers.config.optimizer import build_optimizer
from verl.workers.engine.base import BaseEngineCtx, EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.distill.integrity import weights_checksum
from cartridge_distill.distill.on_policy import check_versions
from cartridge_distill.distill.rates import warmed_and_decayed
from cartridge_distill.distill.teacher import Teacher
from cartridge_distill.distill.token_loss import TokenLoss
from cartridge_distill.model.flex import graphs
from cartridge_distill.model.forward import recomputing_layers
from cartridge_distill.model.identity import weights_fingerprint
from cartridge_distill.model.prompts import begin_of_text, render_document
from cartridge_distill.model.warm_up import compile_attention
from cartridge_distill.util.errors import ConfigError, OffPolicyError
from verl_patches.actor import engine_state
from verl_patches.actor.device import StageSeconds
from verl_patches.actor.forwards import score
from verl_patches.actor.initial_cartridge import initial_cartridge
from verl_patches.actor.initial_state import load_base, load_validation
from verl_patches.actor.kept_versions import OwnVersionCheck
from verl_patches.actor.memory import check_memory
from verl_patches.actor.ranks import (
    RanksTeacher,
    all_ranks,
    average_gradients,
    copy_from_rank_0,
    most_of_ranks,
    shard,
)
from verl_patches.actor.samples import Samples, later_tokens
from verl_patches.actor.step_checks import StepChecks
from verl_patches.actor.token_sums import StepSums
from verl_patches.hooks import ENGINE_MODEL_TYPE, cartridge_config_of


def _say(line: str) -> None:
    """A line that a person who waits for the run sees."""
    if torch.distributed.get_rank() == 0:
        print(f"[cartridge] {line}", flush=True)


class _ModeCtx(BaseEngineCtx):
    """train/eval mode of veRL without ``module.train()``: the base model stays in eval mode."""

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        if self.mode == "train":
            self.engine.optimizer_zero_grad()
        super().__exit__(exc_type, exc_val, exc_tb)


@EngineRegistry.register(
    model_type=ENGINE_MODEL_TYPE, backend=["fsdp", "fsdp2"], device=["cuda", "npu", "cpu"]
)
class CartridgeEngine(FSDPEngineWithLMHead):
    """Trains a :class:`TrainableCache` on a frozen model.

    Attributes:
        cartridge: the student's prefix, float32 master weights.
        teacher: the same module with a document's KV as prefix.
        step: optimizer steps done.
        version: batches trained on; the version that the next batch's rollouts must carry, or one
            of the ``async_steps`` before it.
    """

    def __init__(
        self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any
    ) -> None:
        self.settings = cartridge_config_of(model_config)
        self.token_loss = TokenLoss.of(self.settings)
        self.step = 0
        self.version = 0
        self._step_of_version = 0
        self._stage = StageSeconds()
        self._sums = StepSums()
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        if self._is_offload_param or self._is_offload_optimizer:
            raise ConfigError(
                "actor.fsdp_config.param_offload / optimizer_offload are for trained weights; a "
                "frozen base and a cartridge of megabytes stay on the device; fix: set both to "
                "False"
            )

    # ---------------------------------------------------------------- set-up

    def initialize(self) -> None:
        """Loads the frozen model, the cartridge, the teacher and the optimizer."""
        start = time.perf_counter()
        module = load_base(self.model_config, self.engine_config)
        several = torch.distributed.get_world_size() > 1
        document_store = DocumentStore.from_file(self.settings.documents)
        render = partial(render_document, self.model_config.tokenizer)
        self.teacher = (RanksTeacher if several else Teacher)(
            module,
            document_store,
            render,
            max_cached=self.settings.teacher_cache_documents,
            backend=self.settings.attention,
            begin=begin_of_text(self.model_config.tokenizer),
            prompt_mib=self.settings.teacher_cache_prompt_mib,
        )
        check_memory(self, module, _say)
        compile_attention(module, self.settings.attention, partial(self._around, module), _say)
        # Before sharding: every rank holds the whole, equal cartridge.
        cartridge = initial_cartridge(
            self.settings, module, self.teacher, self.model_config.local_path
        )
        self.cartridge = cartridge.to(get_device_id())
        self.base_sha256 = engine_state.weights_sha256(weights_checksum(module))
        commit = getattr(module.config, "_commit_hash", None)
        self.model_fingerprint = weights_fingerprint(self.model_config.local_path, commit)
        if several:
            copy_from_rank_0(self.cartridge)
            module = shard(module, self.device_mesh, self.engine_config)
        self.module = module
        self.checks = StepChecks(
            self.settings.max_logprob_diff,
            module,
            self.settings.teacher_temperature,
            self.settings.attention,
            self._stage,
            self.settings.async_steps,
            *([partial(all_ranks, device=self.teacher.device)] if several else []),
        )
        self.own_versions = OwnVersionCheck(
            self.checks.kept,
            self.settings.async_check_fraction,
            (self.settings.seed, torch.distributed.get_rank()),
            module,
            self.teacher.device,
            self.settings.attention,
            self._stage,
            *([partial(most_of_ranks, device=self.teacher.device)] if several else []),
        )
        self.optimizer = build_optimizer(
            self.cartridge.trainable_parameters(), self.optimizer_config
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr
        self.lr_scheduler = self._build_lr_scheduler(self.optimizer)
        self._remember_frozen_tokens()
        self._base_before = weights_checksum(module)
        self.validation = load_validation(self.settings, self.model_config.tokenizer, self.teacher)
        _say(
            f"model loaded; a cartridge of {self.cartridge.num_tokens} tokens "
            f"from {self.settings.init}, {time.perf_counter() - start:.0f} s"
        )

    def _build_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """veRL's schedule, or the straight line down of ``lr_decay_to``."""
        last, optim = self.settings.lr_decay_to, self.optimizer_config
        if last is None:
            return super()._build_lr_scheduler(optimizer)
        total, warmup = optim.total_training_steps, optim.lr_warmup_steps
        if warmup <= 0:  # as veRL reads them
            warmup = int(optim.lr_warmup_steps_ratio * total)
        return LambdaLR(optimizer, warmed_and_decayed(warmup, total, last))

    def _remember_frozen_tokens(self) -> None:
        self._frozen_before = [p.detach().clone() for p in self._frozen_tokens()]

    def _frozen_tokens(self) -> list[Tensor]:
        return [*self.cartridge.frozen_keys, *self.cartridge.frozen_values]

    # ---------------------------------------------------------------- one step

    def train_mode(self, **kwargs: Any) -> BaseEngineCtx:
        return _ModeCtx(self, "train", **kwargs)

    def eval_mode(self, **kwargs: Any) -> BaseEngineCtx:
        return _ModeCtx(self, "eval", **kwargs)

    def train_batch(self, data: TensorDict, loss_function: Any) -> dict[str, Any]:
        self._check_staleness()
        staleness = self.staleness
        self.checks.begin_batch()
        self.own_versions.begin_batch()
        self._sums.begin()
        prompts = self._prompt_tokens()
        self._stage.take()
        start = time.perf_counter()
        output: dict[str, Any] = super().train_batch(data, loss_function)
        # The gradient's norm has been fetched, so the device is done: nothing waits here.
        whole, seconds = time.perf_counter() - start, self._stage.take()
        seconds["student_backward"] = whole - sum(seconds.values())
        own = {
            "frozen_tokens_changed": float(self._frozen_changed()),
            "staleness_max": float(max(staleness, self.own_versions.oldest)),
            "teacher_prefills": float(self.teacher.prefills),
            **{name: count - prompts[name] for name, count in self._prompt_tokens().items()},
            "attention_graphs": float(len(graphs())),
            **self._sums.means(self.teacher.device),
            **{f"seconds/{stage}": value for stage, value in seconds.items()},
        }
        # veRL expects a list a metric: one value a micro-batch, gathered over the ranks.
        output["metrics"].update({name: [value] for name, value in own.items()})
        return output

    def _prompt_tokens(self) -> dict[str, float]:
        """Tokens of prompts that the teacher computed and that it had kept, so far."""
        kept = self.teacher.prompts
        if kept is None:
            return {}
        return {
            "teacher_prompt_tokens/computed": float(kept.computed),
            "teacher_prompt_tokens/kept": float(kept.found),
        }

    def _frozen_changed(self) -> bool:
        pairs = zip(self._frozen_before, self._frozen_tokens(), strict=True)
        return bool(torch.stack([(before != now).any() for before, now in pairs]).any())

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Any, forward_only: bool = False
    ) -> Any:
        """veRL's, which divides by the tokens of ``loss_mask``: those that have a loss.

        Raises:
            RolloutError: no token of the batch has one.
        """
        if self.token_loss.skip_first:
            data["loss_mask"] = later_tokens(data["response_mask"], self.token_loss.skip_first)
        return super().forward_backward_batch(data, loss_function, forward_only)

    def forward_step(
        self, micro_batch: TensorDict, loss_function: Any, forward_only: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """Student and teacher over one micro-batch.

        Raises:
            OffPolicyError: rollouts of another version, or log-probs that differ past the bound
                from those of whoever wrote the tokens.
            DocumentError: a sample's document is missing or too long.
        """
        samples = Samples.from_micro_batch(micro_batch, self.settings.document_key)
        ahead = self.settings.async_steps
        check_versions(samples.authors, samples.steps, self.version, ahead)
        # Before the student's forward, whose memory is not taken yet.
        own = self.own_versions.run(samples, self.version) if ahead else None
        prefix = self.cartridge.prefix()
        scored = score(
            samples,
            self.module,
            prefix,
            self.teacher,
            self.settings,
            self.token_loss,
            self._stage,
            partial(self._around, self.module),
        )
        loss, _ = loss_function(
            model_output={"token_loss": scored.token_loss},
            data=micro_batch,
            dp_group=self.get_data_parallel_group(),
        )
        metrics: dict[str, Any] = self.checks.run(
            samples, scored.computed(loss), self.version, self.staleness > 0, prefix, own
        )
        self._sums.add(metrics)
        metrics["response_tokens"] = float(scored.token_loss.numel())
        return loss, {"model_output": {}, "loss": metrics.pop("loss"), "metrics": metrics}

    def _around(self, module: Any) -> AbstractContextManager[None]:
        """Around the student's forward alone: the teacher's keeps nothing for a backward."""
        if self.model_config.enable_gradient_checkpointing:
            return recomputing_layers(module)
        return nullcontext()

    @property
    def staleness(self) -> int:
        """Optimizer steps taken since the version that wrote the current batch."""
        return self.step - self._step_of_version

    def lr_scheduler_step(self) -> float:
        """veRL calls it once a batch, after the last of its optimizer steps."""
        self.version += 1
        self._step_of_version = self.step
        rate: float = super().lr_scheduler_step()
        return rate

    def _check_staleness(self) -> None:
        allowed = self.settings.max_staleness
        if self.staleness > allowed:
            raise OffPolicyError(
                f"optimizer step {self.staleness + 1} on one batch of rollouts, and "
                f"actor.cartridge.max_staleness={allowed}; fix: set actor.ppo_mini_batch_size to "
                "data.train_batch_size, or allow staleness"
            )

    def optimizer_zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def optimizer_step(self) -> float:
        """Averages gradients over ranks, clips, steps; returns the norm before clipping.

        Raises:
            FloatingPointError: the norm is not finite. veRL would skip the step and go on.
        """
        parameters = self.cartridge.trainable_parameters()
        if torch.distributed.get_world_size() > 1:
            average_gradients(parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.optimizer_config.clip_grad))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the cartridge's gradient norm is {norm}; the step was not taken"
            )
        if not self.staleness:
            self.checks.remember(self.version, self.cartridge.prefix())
        self.optimizer.step()
        self.step += 1
        return norm

    def validate(self) -> dict[str, float]:
        """KL, log-loss and accuracy of the cartridge on the held-out questions.

        All ranks call it together and get the same.

        Raises:
            ConfigError: ``actor.cartridge.eval_questions`` is not set.
        """
        if self.validation is None:
            raise ConfigError(
                "actor.cartridge.eval_questions is null: nothing to validate on; fix: set it, or "
                "trainer.test_freq=-1"
            )
        return self.validation.run(self.cartridge.prefix())

    # ---------------------------------------------------------------- what leaves the engine

    def get_per_tensor_param(self, **_: Any) -> tuple[Iterator[tuple[str, Tensor]], None]:
        """veRL's weight update carries the cartridge and nothing else."""
        tensors = ((name, tensor.detach()) for name, tensor in self.cartridge.state_dict().items())
        return tensors, None

    def to(
        self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True
    ) -> None:
        """Nothing moves: offloading is refused in ``__init__``."""

    def save_checkpoint(
        self,
        local_path: str,
        hdfs_path: str | None = None,
        global_step: int = 0,
        max_ckpt_to_keep: int | None = None,
        **_: Any,
    ) -> None:
        """Writes cartridge and training state, megabytes; the base model is already on disk.

        Raises:
            RuntimeError: the base weights are no longer those that were loaded.
        """
        if weights_checksum(self.module) != self._base_before:
            raise RuntimeError("the frozen base model's weights changed during training")
        engine_state.keep_on(self)
        if self.rank == 0:
            engine_state.save(self, Path(local_path))
        torch.distributed.barrier()

    def load_checkpoint(self, local_path: str, *_: Any, **__: Any) -> None:
        """Goes on from what :meth:`save_checkpoint` wrote, with any number of ranks.

        Raises:
            CartridgeFormatError: it is missing, damaged or does not fit.
            ConfigError: it is of a run with other settings.
        """
        engine_state.restore(self, Path(local_path))
        self._remember_frozen_tokens()
        self.checks.forget()
        self._step_of_version = self.step
