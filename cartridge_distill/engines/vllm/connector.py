"""The class that vLLM loads: ``--kv-transfer-config`` names it.

vLLM makes it twice. The *scheduler half* looks at each request, says how many of its tokens need
not be computed, and notes the blocks that vLLM took for them. The *worker half*, one in each
worker process, fills those blocks before the forward that reads them. Loads are synchronous: they
take milliseconds, and blocks that hold a version are shared from the same step on.

An exception in the scheduler half would end vLLM's engine, with all its requests. So a request
that must not be computed is noted there, and failed: it asks for a load, and the load fails.

This module imports vLLM, and is imported by vLLM alone.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from cartridge_distill.engines.vllm.catalogue import Catalogue
from cartridge_distill.engines.vllm.options import Options
from cartridge_distill.engines.vllm.placing import layer_number, slots
from cartridge_distill.engines.vllm.planning import Load, Plan, Planner
from cartridge_distill.engines.vllm.resident import DeviceKv, Residents
from cartridge_distill.engines.vllm.versions import known
from cartridge_distill.util.errors import (
    CartridgeDistillError,
    CartridgeFormatError,
    ConfigError,
    with_fix,
)

# vLLM shows what its own loggers say, and these are below them.
logger = logging.getLogger("vllm.cartridges")

_PR_SET_PDEATHSIG = 1


@dataclass
class Step(KVConnectorMetadata):
    """What the scheduler half tells the worker half of one step."""

    plan: Plan


class CartridgeConnector(KVConnectorBase_V1, SupportsHMA):
    """Cartridges as KV from elsewhere; see the module.

    Raises:
        ConfigError: a setting of vLLM's or of ours with which cartridges are not served.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        import vllm

        self._known = known(vllm.__version__)
        _check_config(vllm_config, kv_cache_config)
        options = Options.read(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self._half: Planner | _Worker
        if role == KVConnectorRole.SCHEDULER:
            self._half = Planner()
        else:
            self._half = _Worker(vllm_config, kv_cache_config, options, self._known.fails_requests)
        _end_with_parent()

    @property
    def _scheduler(self) -> Planner:
        assert isinstance(self._half, Planner)
        return self._half

    @property
    def _worker(self) -> _Worker:
        assert isinstance(self._half, _Worker)
        return self._half

    # --- scheduler ----------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        self._scheduler.take(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._scheduler.tokens_to_load(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens > 0:
            self._scheduler.note(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        return Step(self._scheduler.next_plan())

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._scheduler.forget(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    # --- worker -------------------------------------------------------------------------------

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        step = self._get_connector_metadata()
        assert isinstance(step, Step)
        self._worker.load(step.plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return  # all layers are loaded before the forward begins

    def save_kv_layer(self, *_: Any, **__: Any) -> None:
        return  # nothing is taken out of vLLM's cache

    def wait_for_save(self) -> None:
        return

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._worker.take_refused() or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

        refused = self._worker.take_refused()
        return KVConnectorTransferResults(finished_recving=refused, failed_recving=set(refused))

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_failed_blocks()


class _Worker:
    """Fills blocks of one rank's cache."""

    def __init__(
        self, vllm_config: Any, kv_cache_config: Any, options: Options, fails_requests: bool
    ) -> None:
        from vllm.distributed.parallel_state import (
            get_tensor_model_parallel_rank,
            get_tensor_model_parallel_world_size,
        )

        self._config = vllm_config
        self._groups = kv_cache_config.kv_cache_groups
        self._fails_requests = fails_requests
        self._rank = get_tensor_model_parallel_rank()
        self._ranks = get_tensor_model_parallel_world_size()
        # The front has held the shape against the model's; here it is held against the layers.
        catalogue = Catalogue(options, shape=None)
        self._catalogue = catalogue
        self._max_bytes = int(options.resident_gb * 2**30)
        self._residents: Residents | None = None
        self._refused: set[str] = set()
        self._failed_blocks: set[int] = set()

    def load(self, plan: Plan) -> None:
        """Fills the blocks of a step, and notes what fails."""
        self._refused |= plan.refused.keys()
        if not self._fails_requests:
            for blocks in plan.refused.values():
                self._failed_blocks.update(blocks)
        for load in plan.loads:
            try:
                self._write(load)
            except (CartridgeDistillError, OSError, RuntimeError) as error:
                if len(self._groups) > 1:
                    raise  # vLLM cannot fail one request of such a model; it must not answer
                logger.error("request %s is failed: %s", load.request_id, error)
                self._failed_blocks.update(load.block_ids[0])

    def take_refused(self) -> set[str]:
        refused, self._refused = self._refused, set()
        return refused

    def take_failed_blocks(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def _write(self, load: Load) -> None:
        layers = self._config.compilation_config.static_forward_context
        for group, block_ids in zip(self._groups, load.block_ids, strict=True):
            own = [name for name in group.layer_names if _has_own_kv(layers.get(name))]
            if not own:
                continue
            size = group.kv_cache_spec.block_size
            tokens, places = slots(block_ids, size, load.start, load.wanted.tokens)
            if not tokens:
                continue  # a window has left all of them behind
            device = layers[own[0]].kv_cache.device
            kv = self._resident(device).get(load.wanted)
            mapping = torch.tensor(places, dtype=torch.int64, device=device)
            first, count = tokens[0], len(tokens)
            assert tokens[-1] - first + 1 == count, "null blocks stand at the beginning"
            for name in own:
                _write_layer(name, layers[name], kv, slice(first, first + count), mapping)

    def _resident(self, device: torch.device) -> Residents:
        if self._residents is None:
            self._residents = Residents(
                self._catalogue.read,
                device,
                self._config.model_config.dtype,
                self._rank,
                self._ranks,
                self._max_bytes,
            )
        return self._residents


def _has_own_kv(layer: Any) -> bool:
    """Layers that read the keys and values of an earlier one have none; those of other ranks are
    not here."""
    return layer is not None and getattr(layer, "kv_sharing_target_layer_name", None) is None


def _write_layer(name: str, layer: Any, kv: DeviceKv, tokens: slice, mapping: torch.Tensor) -> None:
    """Writes one layer through the function with which vLLM writes what it computes.

    Raises:
        CartridgeFormatError: the cartridge has another shape than the layer.
        ConfigError: the layer's attention has no such function.
    """
    number = layer_number(name)
    if number >= len(kv.keys):
        raise CartridgeFormatError(
            f"the cartridge has {len(kv.keys)} layers, the model has a layer {number}"
        )
    key, value = kv.keys[number][tokens], kv.values[number][tokens]
    want = (layer.num_kv_heads, layer.head_size)
    if tuple(key.shape[1:]) != want or tuple(value.shape[1:]) != want:
        raise CartridgeFormatError(
            f"layer {number}: the cartridge has {key.shape[1]} KV heads of {key.shape[2]} on this "
            f"rank, the model {want[0]} of {want[1]}"
        )
    write = getattr(layer.impl, "do_kv_cache_update", None)
    if write is None:
        raise ConfigError(
            f"vLLM's attention {type(layer.impl).__name__} has no do_kv_cache_update, which writes "
            "cartridges; fix: choose another --attention-backend"
        )
    with torch.no_grad():
        write(layer, key, value, layer.kv_cache, mapping)


def _check_config(config: Any, kv_cache_config: Any) -> None:
    """What is not known to give right answers is refused when vLLM starts.

    Raises:
        ConfigError: naming the setting.
    """
    transfer, parallel = config.kv_transfer_config, config.parallel_config
    for wrong, what in (
        (
            transfer.kv_load_failure_policy != "fail",
            f"kv_load_failure_policy={transfer.kv_load_failure_policy!r}: what fails to load would "
            "be computed from placeholders; fix: say 'fail'",
        ),
        (
            transfer.kv_role != "kv_consumer",
            f"kv_role={transfer.kv_role!r}: nothing is written out here; fix: say 'kv_consumer'",
        ),
        (
            config.speculative_config is not None,
            "speculative decoding: the draft model has no cartridge; fix: leave it out",
        ),
        (
            config.cache_config.cache_dtype not in ("auto", _dtype_name(config)),
            f"kv-cache-dtype={config.cache_config.cache_dtype}: cartridges in a rounded cache were "
            "not tried; fix: leave it out",
        ),
        (
            getattr(parallel, "decode_context_parallel_size", 1) != 1
            or getattr(parallel, "prefill_context_parallel_size", 1) != 1,
            "context parallelism: blocks of one request lie on several ranks; fix: leave it out",
        ),
        (
            getattr(config.model_config, "use_mla", False),
            "a model with latent attention (MLA): its cache holds no keys and values",
        ),
    ):
        if wrong:
            raise ConfigError(
                with_fix(f"cartridges are not served with {what}", "use another model")
            )
    for group in kv_cache_config.kv_cache_groups if kv_cache_config is not None else ():
        if (
            not hasattr(group.kv_cache_spec, "block_size")
            or "Mamba" in type(group.kv_cache_spec).__name__
        ):
            raise ConfigError(
                "cartridges are not served with a model that has a state in place of keys and "
                f"values ({type(group.kv_cache_spec).__name__}); fix: use another model"
            )


def _dtype_name(config: Any) -> str:
    return str(config.model_config.dtype).removeprefix("torch.")


def _end_with_parent() -> None:
    """The engine's process ends when the server is killed: it would keep the device for ever."""
    if os.getppid() != 1 and _is_child():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _is_child() -> bool:
    import multiprocessing

    return multiprocessing.parent_process() is not None
