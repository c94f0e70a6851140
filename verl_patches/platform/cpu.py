"""A CPU platform for veRL.

``VERL_PLATFORM=cpu`` chooses it, ``VERL_USE_EXTERNAL_MODULES=verl_patches.plugin`` makes it known.

veRL 0.9.1 ships platforms for accelerators only. This one says "cpu" where they say "cuda" and
gives the accelerator module veRL asks for memory figures and RNG state a shim with none of them.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


class _CpuDeviceModule(ModuleType):
    """What veRL calls on ``torch.cuda``, for a machine that has no accelerator memory or stream."""

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_name(self, _device: Any = None) -> str:
        return "CPU"  # veRL's table of peak FLOP/s knows it

    def set_device(self, _device: Any) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def synchronize(self, _device: Any = None) -> None:
        return None

    def memory_allocated(self, _device: Any = None) -> int:
        return 0

    def memory_reserved(self, _device: Any = None) -> int:
        return 0

    def max_memory_allocated(self, _device: Any = None) -> int:
        return 0

    def max_memory_reserved(self, _device: Any = None) -> int:
        return 0

    def reset_peak_memory_stats(self, _device: Any = None) -> None:
        return None

    def mem_get_info(self, _device: Any = None) -> tuple[int, int]:
        return 0, 0

    def get_rng_state(self, _device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, _device: Any = None) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """No accelerator: gloo, no Ray resource but CPUs, no IPC."""

    _module = _CpuDeviceModule("verl_patches.cpu_device")

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return self._module

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # never chosen by probing, only by VERL_PLATFORM=cpu

    def current_device(self) -> torch.device:  # veRL calls .to() with it
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg: str) -> Any:
        return nullcontext()

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {}

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None
