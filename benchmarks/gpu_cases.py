"""The models whose attention is compiled without a GPU, and the batches that must not compile anew.

A case is a model family in one dtype: two layers with the real family's heads, head size, window
and soft cap, everything else as small as it goes. It runs what a training run does, through
transformers and this project's own functions: the warm-up (:mod:`cartridge_distill.warm_up`), then
documents, teacher and student at other lengths. All of that computes on the CPU, only what the
attention gives to torch.compile goes to the compiler for a GPU, which answers with nothing but the
right shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.gpu_compiler import Gpu, OfflineCompiler
from cartridge_distill import flex
from cartridge_distill.cartridge import TrainableCache
from cartridge_distill.forward import packed_forward
from cartridge_distill.models import prepare_model
from cartridge_distill.packing import pack
from cartridge_distill.prefix import prefix_from_tokens
from cartridge_distill.warm_up import compile_attention

LENGTHS = (1, 5, 70, 100, 128, 300, 2_048, 8_192)
PREFIXES = (0, 128, 2_048, 10_000)

# Enough to meet every branch: one block, several, a prefix that is not whole blocks, a long one.
FEW_BATCHES = ((1, 0), (70, 160), (100, 128), (300, 2_048), (2_048, 0))
ALL_BATCHES = tuple((length, prefix) for length in LENGTHS for prefix in PREFIXES)

MOST_GRAPHS = 4  # of a run of one model, see cartridge_distill/warm_up.py


@dataclass(frozen=True)
class Family:
    """The attention of a published model.

    Attributes:
        architecture: as ``tests/tiny.py`` names them.
        heads: query heads and key-value heads.
        size: of a head.
    """

    name: str
    architecture: str
    heads: tuple[int, int]
    size: int

    def model(self, dtype: torch.dtype) -> PreTrainedModel:
        """Two layers, on the CPU, prepared for packed forwards."""
        kinds = {"mistral_window": "mistral", "gemma3": "gemma3_text"}
        extra: dict[str, Any] = {}
        if self.architecture == "mistral":
            extra["sliding_window"] = None
        if self.architecture == "mistral_window":
            extra["sliding_window"] = 4_096
        if self.architecture in ("gemma2", "gemma3"):
            # The window and the soft cap are the family's own, which transformers knows.
            extra["layer_types"] = ["sliding_attention", "full_attention"]
        config = AutoConfig.for_model(
            kinds.get(self.architecture, self.architecture),
            vocab_size=32,
            hidden_size=2 * self.heads[0],  # some configs want a multiple of the heads
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=self.heads[0],
            num_key_value_heads=self.heads[1],
            head_dim=self.size,
            max_position_embeddings=32_768,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            **extra,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return prepare_model(model)


# Head sizes 64, 96, 128 and 256, and 16 of the tests; 1, 2, 3, 4, 5, 7 and 8 query heads to a key.
FAMILIES = (
    Family("tests/tiny.py", "llama", (4, 2), 16),
    Family("Llama 3.2 1B", "llama", (32, 8), 64),
    Family("Llama 3.2 3B", "llama", (24, 8), 128),
    Family("Llama 3.1 8B", "llama", (32, 8), 128),
    Family("heads of 96", "llama", (32, 32), 96),
    Family("Qwen2.5 0.5B", "qwen2", (14, 2), 64),
    Family("Qwen2.5 7B", "qwen2", (28, 4), 128),
    Family("Qwen3 0.6B", "qwen3", (16, 8), 128),
    Family("Qwen3 14B", "qwen3", (40, 8), 128),
    Family("Mistral 7B v0.3", "mistral", (32, 8), 128),
    Family("Mistral 7B v0.1", "mistral_window", (32, 8), 128),
    Family("Gemma 2B", "gemma", (8, 1), 256),
    Family("Gemma 7B", "gemma", (16, 16), 256),
    Family("Gemma 2 2B", "gemma2", (8, 4), 256),
    Family("Gemma 2 27B", "gemma2", (32, 16), 128),
    Family("Gemma 3 1B", "gemma3", (4, 1), 256),
    Family("Gemma 3 27B", "gemma3", (32, 16), 128),
)


@dataclass(frozen=True)
class Case:
    """One model in one dtype, and the batches that follow its warm-up.

    Attributes:
        batches: tokens of a batch, and tokens of the prefix before them.
    """

    family: Family
    dtype: torch.dtype
    batches: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        query, key = self.family.heads
        dtype = str(self.dtype).removeprefix("torch.")
        name = f"{self.family.name} ({self.family.architecture})"
        return f"{name}, {query}/{key} heads of {self.family.size}, {dtype}"


@dataclass(frozen=True)
class Outcome:
    """What compiling one case gave.

    Attributes:
        shared: bytes that the most demanding kernel asks for.
        problems: a sentence each; none when all is well.
    """

    case: Case
    graphs: int
    kernels: int
    shared: int
    seconds: float
    problems: tuple[str, ...]


@contextmanager
def compiling_for(compiler: OfflineCompiler) -> Iterator[None]:
    """This project's attention on the CPU gives its graphs to ``compiler``."""
    from torch._inductor.utils import clear_caches

    # Else two cases with a kernel in common would compile it once, and one would report none.
    torch._dynamo.reset()
    clear_caches()
    with (
        patch.object(flex, "compiles_on", lambda _device: True),
        patch.object(flex, "inductor", compiler),
        patch.object(flex, "no_more_expected", lambda: None),  # of this process's own log
        compiler.tracing(),
    ):
        yield


def run(case: Case, gpu: Gpu) -> tuple[OfflineCompiler, list[str]]:
    """Compiles a case.

    Returns:
        The compiler with all that it compiled, and the problems found, none when all is well.
    """
    model = case.family.model(case.dtype)
    compiler = OfflineCompiler(gpu)
    problems: list[str] = []
    with compiling_for(compiler):
        try:
            compile_attention(model, "flex", say=lambda _line: None)
            expected = len(compiler.graphs)
            for length, prefix in case.batches:
                _step(model, length, prefix)
                if len(compiler.graphs) > expected:
                    problems.append(
                        f"{length} tokens behind {prefix} made {len(compiler.graphs) - expected} "
                        "graphs more after the warm-up"
                    )
                    expected = len(compiler.graphs)
        except Exception as error:  # whatever torch raises, the table has a row for it
            if not compiler.failures:
                problems.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return compiler, [*problems, *compiler.failures, *problems_of(compiler)]


def _step(model: PreTrainedModel, length: int, prefix: int) -> None:
    """A document of ``length``; then teacher and student: ``length`` tokens behind ``prefix``."""
    ids = torch.zeros(length, dtype=torch.long)
    if not prefix:
        prefix_from_tokens(model, ids, "flex")
        return
    batch = pack([ids] if length == 1 else [ids[: length // 2], ids[length // 2 :]])
    last = batch.index == 0
    cartridge = TrainableCache.from_random(model.config, prefix)
    with torch.no_grad():
        packed_forward(model, cartridge.prefix(), batch, last, "flex")
    packed_forward(model, cartridge.prefix(), batch, last, "flex")


def problems_of(compiler: OfflineCompiler) -> list[str]:
    """What is wrong with what was compiled, a sentence each: a part that is missing, attention that
    is not fused, too many graphs, a kernel that asks for too much."""
    found = [
        f"graph {number}: only {' and '.join(parts) or 'nothing'} compiled"
        for number, parts in enumerate(compiler.graphs, 1)
        if parts not in (["inference"], ["forward", "backward"])
    ]
    if len(compiler.graphs) > MOST_GRAPHS:
        found.append(f"{len(compiler.graphs)} graphs, more than {MOST_GRAPHS}")
    if not any("flex_attention" in kernel.name for kernel in compiler.kernels):
        found.append("no fused attention kernel was compiled")
    limit = compiler.gpu.shared_memory
    found += [
        f"{kernel.name} asks for {kernel.shared:,} B of shared memory, over {limit:,}"
        for kernel in compiler.kernels
        if kernel.shared > limit
    ]
    return found
