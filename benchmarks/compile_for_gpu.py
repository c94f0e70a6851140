"""Compiles this project's attention for a GPU without having one; nothing is launched.

    python benchmarks/compile_for_gpu.py                      # four cases, 1 to 2 minutes
    python benchmarks/compile_for_gpu.py --all                # every family, float32 and bfloat16
    python benchmarks/compile_for_gpu.py --all --only gemma --dtype bfloat16
    python benchmarks/compile_for_gpu.py --all --list

Each case runs the warm-up of a training run and batches of many lengths, with the attention of a
published model (:mod:`benchmarks.gpu_cases`); inductor and Triton compile for the GPU
(:mod:`benchmarks.gpu_compiler`). A case fails when something does not compile, when a kernel asks
for more shared memory than a block may have, when attention would be computed unfused, and when a
batch after the warm-up makes a graph of its own. Any failure makes the exit status 1.

This shows that kernels exist. Their results and their speed only a GPU can show.
Linux on x86-64; a CPU build of torch gets its Triton on the first call.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.gpu_cases import (  # noqa: E402
    ALL_BATCHES,
    FAMILIES,
    FEW_BATCHES,
    Case,
    Outcome,
    run,
)
from benchmarks.gpu_compiler import GPUS, Gpu  # noqa: E402
from benchmarks.triton_for_cpu import start_again_with_triton  # noqa: E402
from cartridge_distill.util.errors import ConfigError  # noqa: E402
from cartridge_distill.util.processes import say  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Small and large heads, a soft cap with a window, and a ratio that is no power of two.
QUICK = (
    ("tests/tiny.py", "float32"),
    ("Llama 3.2 1B", "bfloat16"),
    ("Qwen2.5 0.5B", "bfloat16"),
    ("Gemma 2 2B", "bfloat16"),
)
ALL_LENGTHS_FOR = "Llama 3.2 1B"  # what a length does is the same for every family


def cases(everything: bool, only: str, dtypes: Sequence[str]) -> list[Case]:
    """The cases that the options name.

    Raises:
        ConfigError: they name none.
    """
    found = []
    for family in FAMILIES:
        for name in dtypes:
            many = everything and family.name == ALL_LENGTHS_FOR
            case = Case(family, DTYPES[name], ALL_BATCHES if many else FEW_BATCHES)
            wanted = everything or (family.name, name) in QUICK
            if wanted and only.lower() in str(case).lower():
                found.append(case)
    if not found:
        raise ConfigError(
            f"no case has {only!r} in its name{'' if everything else ' without --all'}; "
            "--list shows the names"
        )
    return found


def compile_all(wanted: Sequence[Case], gpu: Gpu) -> list[Outcome]:
    """One case after the other, with a line for each."""
    outcomes: list[Outcome] = []
    start = time.perf_counter()
    for number, case in enumerate(wanted, 1):
        began = time.perf_counter()
        compiler, problems = run(case, gpu)
        seconds = time.perf_counter() - began
        shared = max((kernel.shared for kernel in compiler.kernels), default=0)
        outcomes.append(
            Outcome(
                case, len(compiler.graphs), len(compiler.kernels), shared, seconds, tuple(problems)
            )
        )
        left = (time.perf_counter() - start) / number * (len(wanted) - number)
        say(
            f"{number} of {len(wanted)}: {case}: {'FAILED' if problems else 'ok'}, "
            f"{seconds:.0f} s; about {left / 60:.0f} minutes left"
        )
        for problem in problems:
            say(f"   {problem}")
    return outcomes


def table(outcomes: Sequence[Outcome], gpu: Gpu) -> str:
    lines = [
        f"| Case | Graphs | Kernels | Shared memory, at most {gpu.shared_memory:,} B | Seconds | |",
        "|---|---|---|---|---|---|",
    ]
    for one in outcomes:
        result = "; ".join(one.problems) or "ok"
        lines.append(
            f"| {one.case} | {one.graphs} | {one.kernels} | {one.shared:,} B "
            f"| {one.seconds:.0f} | {result} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="four cases; the default")
    size.add_argument("--all", action="store_true", help="every family in every dtype")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name")
    parser.add_argument("--dtype", choices=DTYPES, help="one dtype; both by default")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="default: %(default)s")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    options = parser.parse_args(arguments)
    gpu = GPUS[options.gpu]
    try:
        wanted = cases(options.all, options.only, [options.dtype] if options.dtype else [*DTYPES])
        if options.list:
            say("\n".join(str(case) for case in wanted))
            return 0
        start_again_with_triton([__file__, *(sys.argv[1:] if arguments is None else arguments)])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import triton

    warnings.filterwarnings("ignore")  # torch's, about what this does to it on purpose
    say(
        f"{len(wanted)} cases for {gpu.name} (sm_{gpu.architecture}), torch {torch.__version__}, "
        f"Triton {triton.__version__}; nothing is launched"
    )
    outcomes = compile_all(wanted, gpu)
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    say(f"\n{table(outcomes, gpu)}\n\n{len(outcomes) - failed} of {len(outcomes)} cases are ok")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
