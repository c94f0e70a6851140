"""veRL's synchronous trainer, reduced to what distillation needs: rollout, update, sync.

No reward, no advantage, no critic, no recomputed log-probs: the update scores the rollouts itself.
A rollout that failed for good ends the run; veRL's own buffer would pad the batch by repeating
other samples and go on.

With ``async_steps`` the agent loop writes the next batches meanwhile; each step asks for one more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import transfer_queue as tq
from ray.exceptions import RayActorError
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.debug import marked_timer

from cartridge_distill.distill.mixing import STUDENT
from cartridge_distill.distill.on_policy import (
    ages_of,
    the_newest_version,
    the_served_version,
)
from cartridge_distill.util.best_step import note_validation
from cartridge_distill.util.errors import ProcessDied, RolloutError
from verl_patches.actor.samples import column
from verl_patches.actor.worker import CartridgeWorker
from verl_patches.hooks import TRAINER_MODE
from verl_patches.rollout.agent_loop import begin_workers
from verl_patches.rollout.ray_errors import why
from verl_patches.rollout.tokasaurus_rollout.replica import proxy_name
from verl_patches.trainer import run_folder
from verl_patches.trainer.ahead import Ahead, staleness_metrics
from verl_patches.trainer.history import History
from verl_patches.trainer.mixing import Mixing
from verl_patches.trainer.progress import length_metrics, progress_line
from verl_patches.trainer.replay import StrictReplayBuffer
from verl_patches.trainer.training_record import add_training_record
from verl_patches.trainer.watch import ActorWatch, find_actor

# veRL polls its queue every 2 s; a step on a small model takes less. A poll is a metadata lookup.
_POLL_SECONDS = 0.05


@register_trainer(TRAINER_MODE)
class CartridgeTrainer(PPOTrainerSync):
    """A step that starts at version k takes of the student only rollouts that version k made.

    With ``async_steps=S``, of the versions k-S to k.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # The base class compares this with the string "sync" to decide how it buffers.
        self.trainer_mode = "sync"
        self.use_teacher_policy = False  # the teacher lives in the engine
        self.mixing = Mixing(config)
        self.async_steps: int = config.actor_rollout_ref.actor.cartridge.async_steps

    def init(self) -> None:
        """Builds everything and publishes the first version.

        Raises:
            ProcessDied: a process did not live to see the first step.
        """
        self._history = History()
        print("[cartridge] the trainer is up; its workers are being started", flush=True)
        # Nobody looks into the queue before the first step, which may be minutes away: no grace.
        watch = ActorWatch(self._queue(), self._how_to_go_on(), grace_s=0)
        watch.start()
        try:
            super().init()
        except RayActorError as error:
            if (reason := why(error)) is None:
                raise
            message = f"a process died while the run was starting ({reason})"
            raise ProcessDied(f"{message}; {self._how_to_go_on()}") from error
        finally:
            watch.stop()
        print("[cartridge] the server has the version to start from", flush=True)

    def fit(self, agent_loop_manager: Any) -> None:
        """veRL's loop; returns when the last version is served, too.

        Raises:
            SyncError: it did not arrive.
            ProcessDied: a process of the run died, whatever error that led to.
        """
        proxies = self._proxies()
        watch = ActorWatch(self._watched(proxies, agent_loop_manager), self._how_to_go_on())
        self.replay_buffer.watch = watch
        watch.start()
        self._logged_before = self._lines_of_earlier_steps()
        try:
            super().fit(agent_loop_manager)
            ray.get([proxy.current.remote() for proxy in proxies])
        except ProcessDied:
            raise
        except Exception as error:
            try:
                watch.check_now()
            except ProcessDied as died:
                raise died from error
            watch.stop()
            raise
        watch.stop()

    def _proxies(self) -> list[Any]:
        replicas = self.config.trainer.nnodes * self.config.trainer.n_gpus_per_node
        return [find_actor("rollout proxy", proxy_name(rank)) for rank in range(replicas)]

    def _watched(self, proxies: list[Any], agent_loop_manager: Any) -> dict[str, Any]:
        """Everything that a step needs."""
        groups = {
            "training worker": self.actor_rollout_wg.workers,
            "rollout proxy (TokasaurusHttpServer)": proxies,
            "agent loop worker": agent_loop_manager.agent_loop_workers,
        }
        return _numbered(groups) | self._queue()

    def _queue(self) -> dict[str, Any]:
        """The actors that samples pass through; there before everything else."""
        units = self.config.transfer_queue.backend.SimpleStorage.num_data_storage_units
        unit, queue = "storage unit of the sample queue", "controller of the sample queue"
        storage = [find_actor(unit, f"TransferQueueStorageUnit#{n}") for n in range(units)]
        controller = find_actor(queue, "TransferQueueController", "transfer_queue")
        return _numbered({unit: storage, queue: [controller]})

    def _how_to_go_on(self) -> str:
        return (
            "fix: start the same command again: with trainer.resume_mode=auto it goes on from the "
            f"last step that was saved in {self._run_folder}"
        )

    # ---------------------------------------------------------------- checkpoints

    @property
    def _run_folder(self) -> Path:
        return Path(self.config.trainer.default_local_dir).expanduser().absolute()

    def _data_identity(self) -> dict[str, Any]:
        """What a data position means nothing without."""
        data, rollout = self.config.data, self.config.actor_rollout_ref.rollout
        return {
            "data rows": len(self.train_dataset),
            "data.train_batch_size": data.train_batch_size,
            "data.shuffle": data.shuffle,
            "data.seed": data.seed,
            "rollout.n": rollout.n,
            "rollout.temperature": rollout.temperature,
            "data.max_response_length": data.max_response_length,
            "actor.ppo_mini_batch_size": self.config.actor_rollout_ref.actor.ppo_mini_batch_size,
            **self.mixing.identity(self.config),
        }

    def _save_checkpoint(self) -> None:
        """The engine's files, the data position, then the tracker that makes them count.

        Raises:
            ConfigError: the engine's files are on another machine's disk.
        """
        run, step = self._run_folder, self.global_steps
        folder = run_folder.step_folder(run, step)
        run_folder.begin_save(folder)
        self.actor_rollout_wg.save_checkpoint(str(folder / "actor"), None, step)
        run_folder.check_shared(folder / "actor")
        position = {"loader": self._ahead.position(step), "tokens": self.mixing.state()}
        run_folder.write_data_position(folder, position, self._data_identity())
        add_training_record(folder, self.config, self._history.lines)
        self._history.write(run)
        run_folder.mark_complete(run, step)
        run_folder.keep_newest(run, step, self.config.trainer.max_actor_ckpt_to_keep)

    def _load_checkpoint(self) -> None:
        """Goes on where ``trainer.resume_mode`` says, or starts at step 0.

        Raises:
            ConfigError: the checkpoint is of a run with other settings or data, or another run
                trains in the folder.
            CartridgeFormatError: it is not complete.
        """
        self.global_steps = 0
        self._claim = run_folder.claim(self._run_folder)
        trainer = self.config.trainer
        folder = run_folder.checkpoint_to_resume(
            trainer.resume_mode, self._run_folder, trainer.resume_from_path
        )
        if folder is None:
            return
        position = run_folder.read_data_position(folder, self._data_identity())
        self.actor_rollout_wg.load_checkpoint(str(folder / "actor"))
        self.train_dataloader.load_state_dict(position["loader"])
        self.mixing.restore(position["tokens"])
        self.global_steps = run_folder.step_of_folder(folder)
        self._history = History.read(folder.parent, self.global_steps)
        last = self.total_training_steps
        print(f"[cartridge] resumed from {folder}, step {self.global_steps} of {last}", flush=True)
        if self.global_steps >= last:
            print(
                f"[cartridge] nothing is left to train; to go on, raise the number of steps; for a "
                f"new run, give another trainer.default_local_dir than {self._run_folder}",
                flush=True,
            )

    def _lines_of_earlier_steps(self) -> list[dict[str, Any]]:
        """What the file logger, which begins an empty file at every start, should go on from."""
        path = os.environ.get("VERL_FILE_LOGGER_PATH")
        if "file" not in self.config.trainer.logger or path is None:
            return []
        return self._history.with_logged(Path(path), self.global_steps)

    def on_train_begin(self) -> None:
        """The loggers are there, the first step is not."""
        super().on_train_begin()
        trained = self.global_steps - 1
        last = min(
            self.total_training_steps, self.steps_per_epoch * self.config.trainer.total_epochs
        )
        self._ahead = Ahead(self.async_steps, trained, last)
        for line in self._logged_before:
            self.logger.log(data=line["data"], step=line["step"], backend=["file"])

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in self.role_worker_mapping:  # there is but one: actor and rollout
            self.role_worker_mapping[role] = ray.remote(CartridgeWorker)
        begin_workers(self.config)  # beside the rank that loads the model next

    # ---------------------------------------------------------------- validation

    def _validate(self) -> dict[str, float]:
        """Instead of veRL's rewards: the engine's own scores on held-out questions."""
        start = time.monotonic()
        scores = self.actor_rollout_wg.validate_cartridge()[0]
        own = f"  on own text KL {scores['student_kl']:.3f}" if "student_kl" in scores else ""
        print(
            f"[cartridge] validation at step {self.global_steps}/{self.total_training_steps}"
            f"  KL {scores['kl']:.4f}  log-loss {scores['log_loss']:.3f}"
            f"  accuracy {scores['accuracy']:.3f}{own}  {time.monotonic() - start:.1f}s",
            flush=True,
        )
        note_validation(self._run_folder, self.global_steps, scores["kl"])
        return {f"val/{name}": value for name, value in scores.items()}

    # ---------------------------------------------------------------- one step

    def _build_replay_buffer(self) -> ReplayBuffer:
        sampler = self.config.trainer.v1.sampler
        return StrictReplayBuffer(
            trainer_mode="sync",
            trainer_config={},
            max_off_policy_threshold=1,
            max_off_policy_strategy=sampler.max_off_policy_strategy,
            sampler_kwargs=sampler.sampler_kwargs,
            poll_interval=_POLL_SECONDS,
            refill_fn=self._add_prompts_to_generate,
            train_batch_size=self.config.data.train_batch_size,
            gen_batch_size=self.config.data.train_batch_size,
        )

    def prepare_step(self) -> dict[str, Any]:
        """Asks for this step's batch, or for the one that is so many steps ahead."""
        now = self.global_steps
        try:
            for step in self._ahead.due(now):
                self.global_steps = step  # veRL's methods label the prompts with it
                self._add_batch_to_generate()
                self._ahead.asked(step, self.train_dataloader.state_dict())
        finally:
            self.global_steps = now
        return {}

    def _fetch_one_gen_batch(self) -> Any:
        batch = super()._fetch_one_gen_batch()
        # veRL's random uids would order the batch differently in each run.
        uids = [f"step{self.global_steps:08d}n{row:06d}" for row in range(len(batch))]
        tu.assign_non_tensor_stack(batch, "uid", uids)
        self.mixing.label(batch, self.global_steps, (self.global_steps - 1) // self.steps_per_epoch)
        return batch

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> KVBatchMeta:
        """One step; its numbers go into the history, which is saved with it."""
        batch = super().step(metrics, timing_raw)
        numbers = {**metrics, "training/global_step": self.global_steps}
        self._history.add(self.global_steps, self._batch_version, numbers)
        return batch

    def _step_once(
        self, metrics: dict[str, Any], timing_raw: dict[str, float], sample_batch_size: int
    ) -> KVBatchMeta:
        """Rollout -> update; the sync follows in ``on_step_end``.

        Raises:
            RolloutError: a prompt failed for good, with the first causes.
            OffPolicyError: the student's rollouts carry another version than the last one.
        """
        with marked_timer("rollout", timing_raw):
            self.on_sample_begin()
            try:
                batch, found = self.replay_buffer.sample(
                    global_steps=self.global_steps,
                    partition_id="train",
                    batch_size=sample_batch_size,
                )
            except RolloutError as error:
                raise RolloutError(f"{error}; first causes: {self._rollout_errors()}") from error
            metrics.update(found)
            batch.extra_info["temperature"] = self.config.actor_rollout_ref.rollout.temperature
            self.on_sample_end()
        labels = self._check_batch(batch)
        self.mixing.count(batch.tags, labels)
        metrics.update(self._staleness(labels))
        metrics.update(self.mixing.metrics())
        batch = self._balance_batch(batch, metrics=metrics)
        with marked_timer("update", timing_raw):
            batch = self._update_actor(batch, metrics=metrics)
        return batch

    def _rollout_errors(self) -> str:
        workers = self.agent_loop_manager.agent_loop_workers
        errors = [e for found in ray.get([w.take_errors.remote() for w in workers]) for e in found]
        return "; ".join(dict.fromkeys(errors)) or "none recorded, see the log"

    def _check_batch(self, batch: KVBatchMeta) -> list[dict[str, Any]]:
        """The samples' labels, after a look at their number, authors and versions."""
        n = self.config.actor_rollout_ref.rollout.n
        expected = self.config.data.train_batch_size * n
        if len(batch.keys) != expected:
            raise RolloutError(f"the step has {len(batch.keys)} rollouts, expected {expected}")
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"]
        )
        labels: list[dict[str, Any]] = column(data, "extra_fields", expected)
        served = self.global_steps - 1  # version k is what k batches made
        self.mixing.check(batch.tags, labels, self.global_steps, served)
        self._batch_version = self._version_of(labels)
        return labels

    def _version_of(self, labels: list[dict[str, Any]]) -> str:
        """The one version id that the proxies serve, and that all the student's rollouts carry.

        With ``async_steps`` the newest one that they carry: nobody waits for one on its way.
        """
        by_student = [label for label in labels if label["author"] == STUDENT]
        made_with = [label["cartridge_version"] for label in by_student]
        if self.async_steps:
            lists = ray.get([proxy.versions_served.remote() for proxy in self._proxies()])
            return the_newest_version(made_with, lists)
        served = ray.get([proxy.current.remote() for proxy in self._proxies()])
        return the_served_version(made_with, served)

    def _staleness(self, labels: list[dict[str, Any]]) -> dict[str, float]:
        """How old the batch's samples are; in strict mode there is nothing to say."""
        if not self.async_steps:
            return {}
        authors = [label["author"] for label in labels]
        steps = [label.get("global_steps") for label in labels]
        return staleness_metrics(ages_of(authors, steps, self.global_steps - 1), self.async_steps)

    def _compute_metrics(
        self,
        batch: KVBatchMeta,
        metrics: dict[str, Any],
        timing_raw: dict[str, float],
        global_steps: int,
        epoch: int,
    ) -> None:
        metrics.update(
            {
                "training/global_step": global_steps,
                "training/epoch": epoch,
                # of the last optimizer step on the batch; over the bound was refused
                "training/staleness": int(metrics["actor/staleness_max"]),
                **length_metrics(batch.tags),
                **self.mixing.metrics(),
                **{f"timing_s/{name}": seconds for name, seconds in timing_raw.items()},
            }
        )
        mixed = self.mixing.schedule.needs_teacher
        print(
            progress_line(metrics, global_steps, self.total_training_steps, mixed=mixed),
            flush=True,
        )


def _numbered(groups: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Each actor by what it is called, and its number among its kind."""
    return {
        f"{name} {number}": actor
        for name, actors in groups.items()
        for number, actor in enumerate(actors)
    }
