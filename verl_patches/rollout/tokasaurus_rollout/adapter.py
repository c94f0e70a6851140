"""The trainer's end of the sync: veRL's weight update becomes a published cartridge version.

veRL hands every rank a generator of named tensors after each step, and once after start. All ranks
drain it (they may have to gather). Rank 0 takes a copy, tells the proxies which version to wait
for, and returns: veRL goes on (logs, saves, reads the next prompts) while a thread publishes. The
next rollout waits at the proxy, and fails there, with the reason, if the version does not arrive.

The run id is new at each start and noted in the run's folder; what earlier starts of the same run
have left at the server is deleted before the first version is published.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed
from torch import Tensor
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.rollout.base import BaseRollout

from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.rollout.http import ClientSettings
from cartridge_distill.sync.http import HttpPublisher
from cartridge_distill.sync.shared_dir import CartridgePublisher, SharedDirectoryPublisher
from cartridge_distill.sync.versions import new_run_id, version_id
from cartridge_distill.util.errors import CartridgeFormatError, ConfigError, SyncError
from verl_patches.hooks import cartridge_config_of
from verl_patches.rollout.ray_errors import kind_and_message
from verl_patches.rollout.run_ids import record_start
from verl_patches.rollout.tokasaurus_rollout.replica import proxies_of, server_urls


class ServerAdapter(BaseRollout):
    """veRL's rollout object in the training worker; holds no model."""

    def __init__(
        self, config: Any, model_config: Any, device_mesh: Any, *_: Any, **__: Any
    ) -> None:
        super().__init__(config, model_config, device_mesh)
        self.settings = cartridge_config_of(model_config)
        self.rank = torch.distributed.get_rank()
        self.replicas = torch.distributed.get_world_size()  # one GPU, one replica
        self.run_id = new_run_id(self.settings.run_name or "run")
        self._started = False  # nothing was published yet
        self._publisher: CartridgePublisher | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._publishing: Future[None] | None = None

    @property
    def publisher(self) -> CartridgePublisher:
        """Made on first use: only rank 0 ever publishes."""
        if self._publisher is None:
            self._publisher = self._make_publisher()
        return self._publisher

    def _make_publisher(self) -> CartridgePublisher:
        base_model = self.settings.sync_base_model or str(self.model_config.path)
        if self.settings.transport == "http":
            custom = dict(self.config.custom or {})
            urls = server_urls(custom)[: self.replicas]
            settings = ClientSettings(**dict(custom.get("client") or {}))
            return HttpPublisher(urls, base_model, settings)
        if self.settings.sync_dir is None:
            raise ConfigError(
                "actor_rollout_ref.actor.cartridge.sync_dir is not set; fix: give the server's "
                "cartridge directory as the trainer sees it, or set transport=http"
            )
        return SharedDirectoryPublisher(self.settings.sync_dir, base_model)

    def _dtype(self) -> torch.dtype:
        name = self.settings.sync_dtype
        if name == "auto":  # what the trainer computes in: both sides hold the same numbers
            name = self.model_config.cartridge_dtype
        return PrecisionType.to_dtype(name)

    async def update_weights(
        self,
        weights: Iterable[tuple[str, Tensor]],
        wire_format: str = "named_tensors",
        global_steps: int | None = None,
        **_: Any,
    ) -> None:
        """Takes the cartridge after ``global_steps`` steps; a thread publishes the copy.

        Raises:
            SyncError: veRL sent something else, or the version before could not be published.
        """
        if wire_format != "named_tensors":
            raise SyncError(
                f"weight update in format {wire_format!r}; a cartridge needs named_tensors"
            )
        tensors = dict(weights)
        if self.rank != 0:
            return
        if global_steps is None:
            raise SyncError("veRL gave no step with its weight update; a version cannot be named")
        if self._publishing is not None:
            self._publishing.result()  # done since the last rollout; its error, if it was one
        try:
            snapshot = Snapshot.take(tensors, self._dtype())
        except CartridgeFormatError as error:
            raise SyncError(f"the weight update is no cartridge: {error}") from error
        publisher, version = self.publisher, version_id(self.run_id, global_steps)
        proxies = proxies_of(self.replicas)
        await asyncio.gather(*[proxy.expect.remote(version) for proxy in proxies])
        self._publishing = self._thread.submit(self._publish, publisher, version, snapshot, proxies)

    def _publish(
        self, publisher: CartridgePublisher, version: str, snapshot: Snapshot, proxies: list[Any]
    ) -> None:
        start = time.monotonic()
        try:
            if not self._started:
                self._clear_up_after_earlier_starts(publisher)
            publisher.publish(version, snapshot)
            ray.get([proxy.activate.remote(version) for proxy in proxies])
            # Requests in flight are of batches that are trained later, so none has a version that
            # is older than async_steps. More than those are kept for a person who wants to look.
            publisher.retire(max(self.settings.sync_keep, self.settings.async_steps + 1))
        except BaseException as error:
            ray.get([proxy.give_up.remote(version, kind_and_message(error)) for proxy in proxies])
            raise
        seconds = time.monotonic() - start
        if seconds > 5:
            print(f"[cartridge] version {version} was published in {seconds:.1f} s", flush=True)

    def _clear_up_after_earlier_starts(self, publisher: CartridgePublisher) -> None:
        folder = dict(self.config.custom or {}).get("run_folder")
        if folder is not None:
            earlier = record_start(Path(folder).expanduser().absolute(), self.run_id)
            if gone := publisher.delete_runs(earlier):
                left = ", ".join(gone)
                print(f"[cartridge] deleted what an earlier start has left: {left}", flush=True)
        self._started = True

    async def resume(self, tags: list[str]) -> None:
        """The server's memory is its own; nothing was released."""

    async def release(self) -> None:
        """The server's memory is its own; nothing to release."""
