"""benchmarks/hashing.py: its four lines, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import hashing


def test_each_job_has_its_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--shape", "tiny", "--tokens", "16", "--repeats", "1", "--folder", str(tmp_path)]
    assert hashing.main(small) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tiny, 16 tokens, bfloat16: 0 MB" in lines
    assert len([line for line in lines if " s  " in line]) == 4
    assert not list(tmp_path.iterdir())


def test_nonsense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        hashing.parse(["--tokens", "1"])
    assert "--tokens 1: must be at least 2" in capsys.readouterr().err
