"""veRL's FSDP engine with a cartridge: student forward, teacher forward, KL, step.

The base model is frozen and shared by student and teacher. veRL drives this engine as any other
(``train_mini_batch`` -> ``forward_backward_batch`` -> ``forward_step``); what differs is that the
batch is packed with ``seq_ids``, that only the cartridge has gradients and an optimizer, and that a
step is refused when its rollouts were not made by the cartridge being trained, or its answers not
by the teacher with the document.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from tensordict import TensorDict
from torch import Tensor
from verl.utils.device import get_device_id
from verl.workers.config.optimizer import build_optimizer
from verl.workers.engine.base import BaseEngineCtx, EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from cartridge_distill.document_store import DocumentStore
from cartridge_distill.errors import ConfigError, OffPolicyError
from cartridge_distill.float32_forward import float32_logprobs, leading
from cartridge_distill.forward import packed_forward, recomputing_layers
from cartridge_distill.integrity import weights_checksum
from cartridge_distill.logprobs import chosen_logprobs
from cartridge_distill.loss import get_loss
from cartridge_distill.mixing import STUDENT, TEACHER
from cartridge_distill.packing import pack
from cartridge_distill.prefix import Prefix
from cartridge_distill.prompts import render_document
from cartridge_distill.teacher import Teacher
from verl_patches import engine_state
from verl_patches.agreement import RoundingCheck, differences
from verl_patches.building import initial_cartridge, load_base, load_validation
from verl_patches.hooks import ENGINE_MODEL_TYPE, cartridge_config_of
from verl_patches.ranks import RanksTeacher, average_gradients, make_equal, shard
from verl_patches.samples import Samples


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
        version: batches trained on; the version that the next batch's rollouts must carry.
    """

    def __init__(
        self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any
    ) -> None:
        self.settings = cartridge_config_of(model_config)
        self.compute_loss = get_loss(self.settings.loss)
        self.step = 0
        self.version = 0
        self._step_of_version = 0
        self._seconds: dict[str, float] = defaultdict(float)
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        if self._is_offload_param or self._is_offload_optimizer:
            raise ConfigError(
                "actor.fsdp_config.param_offload / optimizer_offload are for trained weights; a "
                "frozen base and a cartridge of megabytes stay on the device: set both to False"
            )

    # ---------------------------------------------------------------- building

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
        )
        # Before sharding: every rank holds the whole, equal cartridge.
        cartridge = initial_cartridge(self.settings, module, self.teacher)
        self.cartridge = cartridge.to(get_device_id())
        self.base_sha256 = engine_state.weights_sha256(weights_checksum(module))
        # With a bound on the largest difference, nothing else is measured.
        self.rounding_check = None
        if self.settings.max_logprob_diff is None:
            self.rounding_check = RoundingCheck(next(module.parameters()).dtype)
        if several:
            make_equal(self.cartridge)
            module = shard(module, self.device_mesh, self.engine_config)
        self.module = module
        self.optimizer = build_optimizer(
            self.cartridge.trainable_parameters(), self.optimizer_config
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr
        self.lr_scheduler = self._build_lr_scheduler(self.optimizer)
        self._remember_frozen_tokens()
        self._base_before = weights_checksum(module)
        self.validation = load_validation(self.settings, self.model_config.tokenizer, self.teacher)
        if torch.distributed.get_rank() == 0:
            print(
                f"[cartridge] model loaded; a cartridge of {self.cartridge.num_tokens} tokens "
                f"from {self.settings.init}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )

    def _remember_frozen_tokens(self) -> None:
        self._frozen_before = [p.detach().clone() for p in self._frozen_tokens()]

    def _frozen_tokens(self) -> list[Tensor]:
        return [*self.cartridge.frozen_keys, *self.cartridge.frozen_values]

    # ---------------------------------------------------------------- one step

    def train_mode(self, **kwargs: Any) -> BaseEngineCtx:
        return _ModeCtx(self, "train", **kwargs)

    def eval_mode(self, **kwargs: Any) -> BaseEngineCtx:
        return _ModeCtx(self, "eval", **kwargs)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels are queued; without this the next stage pays
        self._seconds[stage] += time.perf_counter() - start

    def train_batch(self, data: TensorDict, loss_function: Any) -> dict[str, Any]:
        self._check_staleness()
        staleness = self.staleness
        if self.rounding_check is not None:
            self.rounding_check.begin_batch()
        self._seconds.clear()
        start = time.perf_counter()
        output: dict[str, Any] = super().train_batch(data, loss_function)
        measured = sum(self._seconds.values())
        self._seconds["student_backward"] = time.perf_counter() - start - measured
        changed = any(
            not torch.equal(a, b)
            for a, b in zip(self._frozen_before, self._frozen_tokens(), strict=True)
        )
        own = {
            "frozen_tokens_changed": float(changed),
            "staleness_max": float(staleness),
            "teacher_prefills": float(self.teacher.prefills),
            **{f"seconds/{stage}": seconds for stage, seconds in self._seconds.items()},
        }
        # veRL expects a list a metric: one value a micro-batch, gathered over the ranks.
        output["metrics"].update({name: [value] for name, value in own.items()})
        return output

    def forward_step(
        self, micro_batch: TensorDict, loss_function: Any, forward_only: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """Student and teacher over one micro-batch.

        Raises:
            OffPolicyError: rollouts of another version, or log-probs that differ past the bound
                from those of whoever wrote the tokens.
            DocumentError: a sample's document is missing or too long.
        """
        samples = Samples.from_micro_batch(
            micro_batch.to(get_device_id()), self.settings.document_key
        )
        self._check_versions(samples)
        cfg = self.settings
        batch = pack(samples.sequences)
        wanted = torch.cat(samples.wanted)
        with self._timed("student_forward"), self._recomputing():
            logits = packed_forward(
                self.module,
                self.cartridge.prefix(),
                batch,
                keep=batch.predicts(wanted),
                backend=cfg.attention,
            )
        tokens = batch.input_ids[wanted]
        metrics, found = self._check_logprobs(samples, logits.detach(), tokens)
        with self._timed("teacher_forward"):
            teacher = self.teacher.topk(
                samples.sequences,
                samples.wanted,
                samples.document_ids,
                cfg.topk,
                cfg.kl_temperature,
                chosen_at=self._answer_temperature(samples),
            )
        metrics |= self._check_answers(samples, teacher.chosen, tokens, found)
        with self._timed("loss"):
            token_loss = self.compute_loss(logits, teacher, cfg.kl_temperature)
            loss, _ = loss_function(
                model_output={"token_loss": token_loss},
                data=micro_batch,
                dp_group=self.get_data_parallel_group(),
            )
        metrics["teacher_tail_mass"] = teacher.tail_logprob.exp().mean().item()
        metrics["response_tokens"] = float(token_loss.numel())
        return loss, {"model_output": {}, "loss": loss.detach().item(), "metrics": metrics}

    def _recomputing(self) -> AbstractContextManager[None]:
        """Around the student's forward alone: the teacher's keeps nothing for a backward."""
        if self.model_config.enable_gradient_checkpointing:
            return recomputing_layers(self.module)
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
                f"actor.cartridge.max_staleness={allowed}; set actor.ppo_mini_batch_size to "
                "data.train_batch_size, or allow staleness"
            )

    def _check_versions(self, samples: Samples) -> None:
        authors = list(zip(samples.sources, samples.steps, strict=True))
        if stamped := sorted(
            {step for who, step in authors if who == TEACHER and step is not None}
        ):
            raise OffPolicyError(
                f"answers of the teacher carry cartridge steps {stamped}; the teacher has the "
                "document and no cartridge. The rollout proxy is out of order"
            )
        own = {step for who, step in authors if who != TEACHER}
        stale = sorted(own - {self.version}, key=str)
        if stale:
            raise OffPolicyError(
                f"rollouts of cartridge step {stale} reached the trainer at step {self.version}; "
                "on-policy training takes step "
                f"{self.version} only. The rollout proxy or the sync is out of order"
            )

    def _check_logprobs(
        self, samples: Samples, logits: Tensor, tokens: Tensor
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """The student's tokens: the best staleness alarm there is.

        Later optimizer steps on one batch (``max_staleness``) move away from the server by intent;
        there the difference is a metric of its own.

        Returns:
            Metrics, and the differences that count as server against trainer.
        """
        own = chosen_logprobs(logits, tokens, samples.temperature)
        mine = ~samples.by_teacher
        by_rounding = {}
        if self.rounding_check is not None and not self.staleness:
            # Also when the teacher wrote all of it: every rank runs the model equally often.
            by_rounding = self.rounding_check.student(
                self.version,
                own,
                samples.rollout_logprobs,
                mine,
                self.cartridge.prefix(),
                partial(self._logprobs_behind, samples),
                partial(self._logprobs_in_float32, samples),
            )
        if not bool(mine.any()):
            return {"student_logprob": own.mean().item()}, []
        bound = None if self.staleness else self.settings.max_logprob_diff
        found = differences(STUDENT, own[mine], samples.rollout_logprobs[mine], tokens[mine], bound)
        if self.staleness:
            return {"stale_logprob_diff/max": found.max().item()}, []
        return {"student_logprob": own.mean().item(), **by_rounding}, [found]

    @torch.no_grad()
    def _logprobs_behind(self, samples: Samples, prefix: Prefix) -> Tensor:
        """Log-probs of the first samples' wanted tokens behind another cartridge."""
        count = leading(samples.sequences)
        batch = pack(samples.sequences[:count])
        wanted = torch.cat(samples.wanted[:count])
        with self._timed("version_check"):
            keep = batch.predicts(wanted)
            logits = packed_forward(self.module, prefix, batch, keep, self.settings.attention)
            return chosen_logprobs(logits, batch.input_ids[wanted], samples.temperature)

    def _logprobs_in_float32(self, samples: Samples, prefix: Prefix) -> Tensor:
        """Of the same tokens, without rounding, behind the cartridge as a server has it."""
        count = leading(samples.sequences)
        dtype = next(self.module.parameters()).dtype
        some = samples.sequences[:count], samples.wanted[:count]
        with self._timed("version_check"):
            return float32_logprobs(self.module, prefix, *some, samples.temperature, dtype)

    def _check_answers(
        self, samples: Samples, chosen: Tensor | None, tokens: Tensor, so_far: list[Tensor]
    ) -> dict[str, Any]:
        """The teacher's tokens against the teacher's forward, and the metrics of all together."""
        metrics = {}
        if chosen is not None:
            theirs = samples.by_teacher
            if self.rounding_check is not None:
                at = self._answer_temperature(samples) or 1.0  # greedy leaves the logits alone
                ratio = at / (samples.temperature or 1.0)
                self.rounding_check.teacher(chosen, samples.rollout_logprobs, theirs, ratio)
            found = differences(
                TEACHER,
                chosen[theirs],
                samples.rollout_logprobs[theirs],
                tokens[theirs],
                self.settings.max_logprob_diff,
            )
            metrics["logprob_diff/teacher_max"] = found.max().item()
            so_far = [*so_far, found]
        if so_far:
            difference = torch.cat(so_far)
            metrics["logprob_diff/max"] = difference.max().item()
            metrics["logprob_diff/mean"] = difference.mean().item()
            if self.settings.max_logprob_diff is not None:  # the report draws it
                metrics["logprob_diff/bound"] = self.settings.max_logprob_diff
        return metrics

    def _answer_temperature(self, samples: Samples) -> float | None:
        """At which the teacher's answers were sampled; None when there are none."""
        if TEACHER not in samples.sources:
            return None
        own = self.settings.teacher_temperature
        return samples.temperature if own is None else float(own)

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
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.optimizer_config.clip_grad)
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(
                f"the cartridge's gradient norm is {norm}; the step was not taken"
            )
        if self.rounding_check is not None and not self.staleness:
            self.rounding_check.remember(self.cartridge.prefix())
        self.optimizer.step()
        self.step += 1
        return float(norm)

    def validate(self) -> dict[str, float]:
        """KL, log-loss and accuracy of the cartridge on the held-out questions.

        All ranks call it together and get the same.

        Raises:
            ConfigError: ``actor.cartridge.eval_questions`` is not set.
        """
        if self.validation is None:
            raise ConfigError("actor.cartridge.eval_questions is null: nothing to validate on")
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
        self._step_of_version = self.step
