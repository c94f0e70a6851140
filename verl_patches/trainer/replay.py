"""The queue of samples as the trainer wants it: whole batches, in their order, or an error.

veRL's own buffer takes whatever prompts are done first, and pads a batch by repeating samples in
the place of those that failed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from cartridge_distill.util.errors import RolloutError
from verl_patches.trainer.watch import ActorWatch


class StrictReplayBuffer(ReplayBuffer):
    """Gives a step's batch only when every prompt of it came back; ordered, so that runs repeat.

    Batches that were asked for ahead wait for their own step: the data then have one position,
    behind the last batch that was trained.

    Attributes:
        watch: asked at every look for results: of a dead process none would come, for ever.
    """

    watch: ActorWatch | None = None
    _step = 0

    def sample(
        self, global_steps: int, partition_id: str, batch_size: int
    ) -> tuple[KVBatchMeta, dict[str, Any]]:
        """The batch that was asked for as this step's.

        Raises:
            RolloutError: a prompt of this batch, or of one that was asked for ahead, failed for
                good.
            ProcessDied: a process of the run died.
        """
        self._step = global_steps
        found: tuple[KVBatchMeta, dict[str, Any]] = super().sample(
            global_steps=global_steps, partition_id=partition_id, batch_size=batch_size
        )
        return found

    def _sampleable_terminal_keys(
        self,
        partition_id: str,
        eviction_reasons: tuple[set[str], set[str], set[str], Counter[float]],
    ) -> set[str]:
        done: set[str] = super()._sampleable_terminal_keys(partition_id, eviction_reasons)
        step_of = self.prompt_global_steps[partition_id]
        return {uid for uid in done if step_of[uid] == self._step}

    def _sync_metadata_from_transfer_queue(self) -> None:
        if self.watch is not None:
            self.watch.check()
        super()._sync_metadata_from_transfer_queue()
        for partition, failed in self.failure_keys.items():
            if failed:
                raise RolloutError(f"{len(failed)} {partition} prompts failed for good")

    def _materialize_batch(self, *args: Any) -> KVBatchMeta:
        batch = super()._materialize_batch(*args)
        # Completion order varies from run to run, and with it the order of float sums.
        order = sorted(range(len(batch.keys)), key=lambda row: batch.keys[row])
        batch.reorder(order)
        return batch
