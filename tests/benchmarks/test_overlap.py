"""benchmarks/overlap.py: its servers take their time, and its table says what a step took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from benchmarks import overlap
from cartridge_distill.util.errors import CartridgeDistillError


def test_a_busy_server_works_on_one_batch_after_the_other() -> None:
    """Eight seconds for four rollouts: two each, and whoever comes late waits for his turn."""
    delays = overlap.Delays([("busy", 8.0)], 9, 4)
    assert [delays.due(100.0) for _ in range(4)] == [102.0, 104.0, 106.0, 108.0]
    assert delays.due(101.0) == 110.0  # of the next batch
    assert delays.due(200.0) == 202.0  # it was idle


def test_a_far_server_works_on_all_at_once() -> None:
    delays = overlap.Delays([("far", 8.0)], 9, 4)
    assert [delays.due(now) for now in (100.0, 100.0, 101.0)] == [108.0, 108.0, 109.0]


def test_the_server_changes_its_ways_after_so_many_batches() -> None:
    delays = overlap.Delays([("far", 1.0), ("far", 5.0)], 2, 3)
    assert [delays.due(0.0) for _ in range(8)] == [1.0] * 6 + [5.0] * 2


def step(seconds: float, staleness: int) -> dict[str, Any]:
    names = ("timing_s/step", "timing_s/rollout", "timing_s/update")
    return {**dict.fromkeys(names, seconds), "training/staleness": staleness}


def test_the_beginning_is_left_out() -> None:
    metrics = [*[step(9.0, 0)] * 3, step(2.0, 1), step(4.0, 1)]
    assert overlap.steady(metrics, 1) == overlap.Found(3.0, 3.0, 3.0, 1.0)
    with pytest.raises(CartridgeDistillError, match="give more --steps"):
        overlap.steady(metrics[:3], 1)


def test_the_floor_is_the_longer_of_rollout_and_update(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(_: Any, inputs: Path, folder: Path, ways: Any, ahead: int) -> list[dict[str, Any]]:
        assert (inputs / "train.parquet").is_file() and not folder.exists()
        assert ways == [("busy", 5.0), ("busy", 1.0)]
        took = {"timing_s/step": 7.0, "timing_s/rollout": 5.0, "timing_s/update": 2.0}
        if ahead:
            took |= {"timing_s/step": 5.2, "timing_s/rollout": 3.0}
        fast = {**took, "timing_s/step": 2.5, "timing_s/rollout": 1.0}
        return [{**one, "training/staleness": ahead} for one in [took] * 9 + [fast] * 9]

    monkeypatch.setattr(overlap, "trained", trained)
    settings = ["--delays", "5", "1", "--servers", "busy", "--async-steps", "2", "0"]
    assert overlap.main([*settings, "--steps", "9"]) == 0
    printed = capsys.readouterr().out
    assert "| busy | 5 | 0 | 7.0 | 5.0 | 5.0 | 2.0 | 0.0 |" in printed
    assert "| busy | 5 | 2 | 5.2 | 5.0 | 3.0 | 2.0 | 2.0 |" in printed
    assert "| busy | 1 | 2 | 2.5 | 2.0 | 1.0 | 2.0 | 2.0 |" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "6"], "--steps 6: must be at least 7"),
        (["--delays", "-1"], "--delays -1: must be at least 0"),
        (["--async-steps", "-1"], "--async-steps -1: must be at least 0"),
        (["--servers", "slow"], "invalid choice"),
    ],
)
def test_nonsense_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        overlap.parse(arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.integration
@pytest.mark.timeout(900)
def test_whole_runs_print_their_lines(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--delays", "0.5", "--servers", "far", "--async-steps", "0", "1", "--steps", "5"]
    assert overlap.main([*settings, "--batch", "4", "--response-tokens", "4"]) == 0
    printed = capsys.readouterr().out
    assert "| far | 0.5 | 0 |" in printed and "| far | 0.5 | 1 |" in printed
