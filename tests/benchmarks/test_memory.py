"""benchmarks/memory.py: both ways run, and the second copy shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import memory
from tests.scripts.conftest import Run

SCRIPT = Path(memory.__file__)
SMALL = ("--tokens", 16, "--document", 40, "--samples", 2, "--prompt", 4, "--response", 3)


def table_of(stdout: str) -> dict[str, list[str]]:
    """The rows in GiB: one base, two bases."""
    return {line[:29].strip(): line[29:].split() for line in stdout.splitlines() if "GiB" in line}


@pytest.mark.long
def test_the_prediction_is_what_is_measured(run_python: Run) -> None:
    """Without what glibc keeps of freed memory: every piece of it is mapped, and goes back."""
    lengths = ("--tokens", 256, "--document", 400, "--samples", 96, "--prompt", 60)
    done = run_python(
        *(SCRIPT, "--shape", "tiny", "--device", "cpu", *lengths, "--response", 40),
        MALLOC_MMAP_THRESHOLD_="16384",
    )
    assert done.returncode == 0, done.stderr
    rows = table_of(done.stdout)
    held, peak, predicted = (
        float(rows[f"{name}, GiB"][0])
        for name in ("held before the step", "peak of the step", "predicted peak")
    )
    assert peak - held > 0.2  # else there is nothing to compare
    assert predicted - held == pytest.approx(peak - held, rel=0.1), done.stdout


@pytest.mark.long
def test_two_copies_take_a_copy_more(tmp_path: Path, run_python: Run) -> None:
    """90 MB of weights, so that they stand out from what a process takes anyway."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=40_000,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    # bfloat16 on the disk, float32 in memory: weights of the same dtype would be mapped, not read
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    done = run_python(SCRIPT, "--model", tmp_path, "--device", "cpu", *SMALL)
    assert done.returncode == 0, done.stderr
    rows = table_of(done.stdout)
    one, two = map(float, rows["weights, GiB"])
    assert two == pytest.approx(2 * one, abs=0.01)
    first, second = map(float, rows["peak of the step, GiB"])
    assert 0.7 * one < second - first < 1.5 * one
    assert "optimizer, s" in done.stdout


def test_a_shape_that_needs_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        memory.main(["--shape", "llama-3.2-3b", "--device", "cpu"])
    assert "needs a CUDA GPU of 40 GB" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--tokens", "1"), ("--samples", "0")])
def test_nonsense_is_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        memory.main([option, value])
    assert f"{option} {value}: must be at least" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_3b_shape_on_a_gpu(run_python: Run) -> None:
    done = run_python(SCRIPT, "--shape", "llama-3.2-3b")
    assert done.returncode == 0, done.stderr
    assert "peak of the step, GiB" in done.stdout
