"""benchmarks/linear.py: a line for every shape, and the right end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import linear
from cartridge_distill.model.frozen_linear import onednn_is_faster


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a torch without oneDNN")
def test_every_shape_both_ways(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(model_folder), "--rows", "2", "3", "--seconds", "0.001"]
    assert linear.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[float(value) for value in line.split()] for line in lines if line.strip()[0].isdigit()]
    # Of the tiny model: q and o, k and v, gate and up, down, the vocabulary.
    assert len(rows) == 2 * 5 and all(len(row) == 7 for row in rows)
    assert {row[0] for row in rows} == {2, 3}
    assert ("oneDNN" if onednn_is_faster() else "torch") in lines[-1]


def test_no_rows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        linear.parse(["--rows", "0"])
    assert "--rows 0: must be at least 1" in capsys.readouterr().err
