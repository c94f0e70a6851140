"""The trainer's end of the sync: veRL's weight update becomes a published cartridge version.

veRL hands every rank a generator of named tensors after each step, and once after start. All ranks
drain it (they may have to gather), rank 0 publishes and tells the proxies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import ray
import torch
import torch.distributed
from torch import Tensor
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.rollout.base import BaseRollout

from cartridge_distill.cartridge import TrainableCache
from cartridge_distill.errors import ConfigError, SyncError
from cartridge_distill.prefix import Prefix
from cartridge_distill.sync import SharedDirectoryPublisher, new_run_id, version_id
from verl_patches.hooks import cartridge_config_of
from verl_patches.rollout.tokasaurus_rollout.replica import proxy_name


def cartridge_from_tensors(tensors: dict[str, Tensor]) -> TrainableCache:
    """Rebuilds a cartridge from its state dict.

    Raises:
        SyncError: the names are not those of a cartridge: veRL sent other weights.
    """
    parts: dict[str, list[Tensor]] = {}
    for name in ("frozen_keys", "frozen_values", "trainable_keys", "trainable_values"):
        layers = sum(key.startswith(f"{name}.") for key in tensors)
        parts[name] = [tensors[f"{name}.{layer}"] for layer in range(layers)]
    if sum(map(len, parts.values())) != len(tensors) or not parts["frozen_keys"]:
        raise SyncError(f"the weight update is no cartridge: {sorted(tensors)[:4]}...")
    keys = [
        torch.cat(pair, 2)
        for pair in zip(parts["frozen_keys"], parts["trainable_keys"], strict=True)
    ]
    values = [
        torch.cat(pair, 2)
        for pair in zip(parts["frozen_values"], parts["trainable_values"], strict=True)
    ]
    return TrainableCache(Prefix(keys, values), parts["frozen_keys"][0].shape[2])


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
        self._publisher: SharedDirectoryPublisher | None = None

    @property
    def publisher(self) -> SharedDirectoryPublisher:
        """Made on first use: only rank 0 ever publishes."""
        if self._publisher is None:
            if self.settings.sync_dir is None:
                raise ConfigError(
                    "actor_rollout_ref.actor.cartridge.sync_dir is not set; give the server's "
                    "cartridge directory as the trainer sees it"
                )
            name = self.settings.sync_dtype
            if name == "auto":  # what the trainer computes in: both sides hold the same numbers
                name = self.model_config.cartridge_dtype
            self._publisher = SharedDirectoryPublisher(
                self.settings.sync_dir,
                base_model=str(self.model_config.path),
                dtype=PrecisionType.to_dtype(name),
            )
        return self._publisher

    async def update_weights(
        self,
        weights: Iterable[tuple[str, Tensor]],
        wire_format: str = "named_tensors",
        global_steps: int | None = None,
        **_: Any,
    ) -> None:
        """Publishes the cartridge after ``global_steps`` steps; returns when the servers serve it.

        Raises:
            SyncError: it could not be written, or a server does not serve it.
        """
        if wire_format != "named_tensors":
            raise SyncError(
                f"weight update in format {wire_format!r}; a cartridge needs named_tensors"
            )
        tensors = {name: tensor.detach().cpu() for name, tensor in weights}
        if self.rank != 0:
            return
        if global_steps is None:
            raise SyncError("veRL gave no step with its weight update; a version cannot be named")
        version = version_id(self.run_id, global_steps)
        await asyncio.to_thread(self.publisher.publish, version, cartridge_from_tensors(tensors))
        proxies = [ray.get_actor(proxy_name(rank)) for rank in range(self.replicas)]
        await asyncio.gather(*[proxy.activate.remote(version) for proxy in proxies])
        # Synchronous training: between two steps no request is in flight, so none needs an
        # older version; the few that are kept are for a person who wants to look.
        self.publisher.retire(self.settings.sync_keep)

    async def resume(self, tags: list[str]) -> None:
        """The server's memory is its own; nothing was released."""

    async def release(self) -> None:
        """The server's memory is its own; nothing to release."""
