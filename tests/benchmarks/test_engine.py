"""benchmarks/engine.py: a line for every work, with the tokens that were asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import engine


def test_every_row_runs_to_its_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "engine.jsonl"
    arguments = ["--shape", "tiny", "--tokens", "16", "--prompt", "5", "--work", "1x3", "4x2"]
    assert engine.main([*arguments, "--json", str(lines)]) == 0
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(line["rows"], line["new_tokens"]) for line in found] == [(1, 3), (4, 2)]
    # A row's first forward reads its prompt and gives its first token.
    assert [line["forwards"] for line in found] == [3, 2]
    printed = capsys.readouterr().out
    assert "tiny, float32" in printed and "4 x 2" in printed


@pytest.mark.parametrize("work", ["0x3", "3", "3x", "axb"])
def test_work_that_is_none_is_refused(work: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        engine.parse(["--work", work])
    assert "wants ROWSxTOKENS" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        engine.parse(["--device", "cuda"])
    assert "torch sees no GPU here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        engine.parse(["--shape", "llama-3.2-3b"])
    assert "needs a CUDA GPU of 40 GB" in capsys.readouterr().err
