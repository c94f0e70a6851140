"""Devices and dtypes as a user names them: what is not there is said before a model is loaded."""

from __future__ import annotations

import torch

from cartridge_distill.util.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_device(name: str | None) -> torch.device:
    """A device that can be used.

    Args:
        name: as torch writes it; None is the GPU where there is one, else the CPU.

    Raises:
        ConfigError: no device's name, or one that is not here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"--device {name}: no device's name; fix: say cpu, cuda or cuda:1"
        ) from None
    if device.type != "cuda":
        if device.type not in ("cpu", "mps", "xpu"):
            raise ConfigError(f"--device {name}: nothing is computed there; fix: say cpu or cuda")
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ConfigError(
            f"--device {name}: torch {torch.__version__} sees no GPU here (nvidia-smi shows "
            "whether there is one); fix: --device cpu"
        )
    if device.index is not None and device.index >= count:
        raise ConfigError(
            f"--device {name}: {count} GPUs are here; fix: --device cuda:{count - 1} or less"
        )
    return device


def known_dtype(name: str) -> torch.dtype | str:
    """A dtype by its name; ``auto``, which transformers knows, stays.

    Raises:
        ConfigError: another name.
    """
    if name == "auto":
        return name
    if name not in _DTYPES:
        raise ConfigError(f"--dtype {name} is not known; fix: say auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]
