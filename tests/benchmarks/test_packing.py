"""benchmarks/packing.py: every row is printed, ways agree, and ways that disagree end the run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import bases, packing
from cartridge_distill.model.frozen_linear import onednn_is_faster
from cartridge_distill.util.errors import ConfigError
from tests.tiny import tiny_model

SMALL = ("--sequences", "3", "--length", "6", "--prefix", "16", "--document", "20")
SMALL += ("--samples", "2", "--repeats", "1")


def metrics_file(folder: Path) -> Path:
    path = folder / "metrics.jsonl"
    steps = [
        {"timing_s/step": 9.0, "timing_s/rollout": 5.0, "actor/seconds/loss": 1.0},
        {"timing_s/step": 4.0, "timing_s/rollout": 1.0, "actor/seconds/loss": 0.5},
        {"timing_s/step": 4.0, "timing_s/rollout": 3.0, "actor/seconds/loss": 1.5},
    ]
    lines = [json.dumps({"step": n, "data": step}) for n, step in enumerate(steps, 1)]
    path.write_text("\n".join(lines))
    return path


def test_every_table_is_printed(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = metrics_file(tmp_path)
    more = ["--metrics", str(path), "--read", "9", "80"]
    status = packing.main(["--model", str(model_folder), *SMALL, *more])
    printed = capsys.readouterr().out
    assert status == 0, printed
    lines = [line for line in printed.splitlines() if line.count("x ") == 1]
    names = ["packed, grouped", "packed, dense", "one by one, SDPA", "padded batch, SDPA"]
    names += ["PEFT CARTRIDGE, padded"] * (importlib.util.find_spec("peft") is not None)
    names += ["packed, MKL linear"] * onednn_is_faster()
    for name in names:
        assert sum(line.strip().startswith(name) for line in lines) == 2, name  # equal, ragged
    for kind in ("equal", "ragged"):
        assert f"{kind} lengths: {len(names)} ways agree" in printed
    assert "teacher: 2 ways agree" in printed
    assert "document read with each sample" in printed
    assert printed.count("keys and values of the largest: 3 ways agree") == 2
    assert "(e) reading a document of 80 tokens" in printed and "plain products" in printed
    assert "prompts: 2 ways agree" in printed and "prompts' KV kept" in printed
    assert f"torch {torch.__version__}" in printed and "threads" in printed
    [rollout] = [line for line in printed.splitlines() if line.strip().startswith("rollout")]
    assert rollout.split() == ["rollout", "5.00", "2.00", "50%"]
    assert "in update: loss" in printed


def test_one_way_of_one_table(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ["--tables", "student", "--cpu-seconds", "--threads", "1", "--ways"]
    command = ["--model", str(model_folder), *SMALL, *one]
    assert packing.main([*command, "packed, grouped"]) == 0
    printed = capsys.readouterr().out
    assert "one by one" not in printed and "teacher" not in printed and "load: " in printed
    assert packing.main([*command, "packed, twice"]) == 1
    assert "--ways 'packed, twice' is not known here" in capsys.readouterr().err


def test_ways_that_disagree_are_not_timed() -> None:
    good: tuple[Tensor, list[Tensor]] = (torch.zeros(4), [torch.ones(2)])
    wrong: tuple[Tensor, list[Tensor]] = (torch.zeros(4), [torch.ones(2) * 1.01])
    with pytest.raises(ConfigError, match="nothing was timed"):
        packing.check("test", ["wrong", "good"], [wrong, good])


def test_what_would_not_fit_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    ways = packing.ways_for(tiny_model(), 2048, [256] * 64)
    assert "packed, dense" not in [way.name for way in ways]
    assert [ways[0].name, ways[-2].name] == ["packed, grouped", "one by one, SDPA"]
    assert "left out: packed, dense" in capsys.readouterr().out


def test_ragged_and_equal_lengths_hold_the_same_tokens() -> None:
    device = torch.device("cpu")
    equal = bases.make_sequences(100, 8, 32, False, device)
    ragged = bases.make_sequences(100, 8, 32, True, device)
    assert sum(map(len, equal)) == sum(map(len, ragged)) == 256
    assert len(set(map(len, ragged))) == 8


def test_metrics_of_something_else_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        packing.stage_table(tmp_path / "none.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"data": {}}')
    with pytest.raises(ConfigError, match="holds no training step"):
        packing.stage_table(empty)
