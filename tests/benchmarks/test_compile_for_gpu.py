"""benchmarks/compile_for_gpu.py: the attention compiles for a GPU that is not there, and what does
not is found."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import compile_for_gpu
from benchmarks.gpu_cases import FAMILIES, Case, Outcome, problems_of
from benchmarks.gpu_compiler import GPUS, Kernel, OfflineCompiler
from benchmarks.triton_for_cpu import triton_folder
from cartridge_distill.util.errors import ConfigError
from tests.tiny import ARCHITECTURES
from tests.training.conftest import child_environment

SCRIPT = Path(compile_for_gpu.__file__)
H100 = GPUS["h100"]


def test_the_families_are_what_the_project_promises() -> None:
    assert {family.architecture for family in FAMILIES} == set(ARCHITECTURES)
    assert {family.size for family in FAMILIES} >= {64, 96, 128, 256}
    ratios = {family.heads[0] // family.heads[1] for family in FAMILIES}
    assert ratios >= {1, 2, 3, 4, 5, 7, 8}
    for family in FAMILIES:
        config = family.model(torch.float32).config
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        assert heads == (*family.heads, family.size)


def test_cases_are_named_by_the_options() -> None:
    every = compile_for_gpu.cases(True, "", ["float32", "bfloat16"])
    assert len(every) == 2 * len(FAMILIES)
    quick = compile_for_gpu.cases(False, "", ["float32", "bfloat16"])
    assert {(case.family.name, case.dtype) for case in quick} == {
        (name, compile_for_gpu.DTYPES[dtype]) for name, dtype in compile_for_gpu.QUICK
    }
    with pytest.raises(ConfigError, match="no case has 'falcon'"):
        compile_for_gpu.cases(True, "falcon", ["float32"])


def made(graphs: list[list[str]], *kernels: Kernel) -> OfflineCompiler:
    compiler = OfflineCompiler(H100)
    compiler.graphs, compiler.kernels = graphs, list(kernels)
    return compiler


FITS = Kernel("triton_tem_fused_flex_attention_0", H100.shared_memory)


@pytest.mark.parametrize(
    ("compiler", "problem"),
    [
        (made([["inference"]], FITS), None),
        (made([["forward", "backward"]], FITS), None),
        (made([["forward"]], FITS), "graph 1: only forward compiled"),
        (made([["inference"]] * 5, FITS), "5 graphs, more than 4"),
        (made([["inference"]], Kernel("triton_per_fused_0", 8)), "no fused attention kernel"),
        (made([["inference"]], FITS, Kernel("large", 232_449)), "large asks for 232,449 B"),
    ],
)
def test_what_counts_as_a_problem(compiler: OfflineCompiler, problem: str | None) -> None:
    found = problems_of(compiler)
    if problem is None:
        assert found == []
    else:
        assert len(found) == 1 and problem in found[0]


def test_attention_that_is_computed_unfused_is_a_failure() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    rows = torch.zeros(1, 2, 16, 8)
    compiler = OfflineCompiler(H100)
    with compiler.tracing(), pytest.raises(RuntimeError, match="uncompiled"):
        flex_attention(rows, rows, rows)
    assert compiler.failures == ["fell back to unfused attention"]


def test_a_function_cut_into_parts_is_a_failure() -> None:
    compiler = OfflineCompiler(H100)

    def no_attention(tensor: Tensor) -> Tensor:
        return tensor + 1

    torch._dynamo.reset()
    with pytest.raises(Exception, match="a graph without attention"):
        torch.compile(no_attention, backend=compiler)(torch.zeros(3))
    assert len(compiler.failures) == 1


def test_the_table_says_what_failed() -> None:
    case = Case(FAMILIES[0], torch.float32, ())
    outcomes = [Outcome(case, 4, 6, 1_024, 9.0, ()), Outcome(case, 0, 0, 0, 1.0, ("it broke",))]
    lines = compile_for_gpu.table(outcomes, H100).splitlines()
    assert "232,448 B" in lines[0]
    assert lines[2].endswith("| 4 | 6 | 1,024 B | 9 | ok |")
    assert lines[3].endswith("| it broke |")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_attention_compiles_for_an_h100(tmp_path: Path) -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("Triton exists for Linux on x86-64")
    if importlib.util.find_spec("triton") is None:
        try:
            triton_folder()
        except ConfigError as error:
            pytest.skip(f"no Triton to compile with: {error}")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--all"],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(TORCHINDUCTOR_CACHE_DIR=str(tmp_path)),
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2_000:]
    count = len(compile_for_gpu.cases(True, "", ["float32", "bfloat16"]))
    assert f"{count} of {count} cases are ok" in done.stdout
