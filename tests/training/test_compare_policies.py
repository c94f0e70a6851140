"""The comparison's table, and the script around it; its runs are the demo's, tested elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.made import evaluation, write_recipes, write_run
from tests.training.conftest import ROOT
from training.compare_table import main

SCRIPT = ROOT / "training" / "compare_policies.sh"


def compare(**settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT)],
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "PYTHON": sys.executable,
            **settings,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_table_has_mean_and_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = write_recipes(tmp_path)
    assert main([str(run) for run in runs]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:]] for line in lines}
    assert list(cells) == [
        *("recipe", "---", "(untrained cartridge)", "off-policy", "on-policy", "mixed"),
        "(full document)",
    ]
    # kl is 0.590, 0.602, 0.614 and log_loss 1.88, 1.93, 1.98 over the seeds
    assert cells["off-policy"][:3] == ["3", "0.602 ± 0.012", "1.930 ± 0.050"]
    assert cells["(full document)"][1:4] == ["0.000", "1.270", "0.900"]


def test_a_run_that_was_not_evaluated_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "half", evaluated={})
    assert main([str(run)]) == 1
    assert f"cartridge-distill eval with --out {run}" in capsys.readouterr().err


def test_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    for policy in ("off-policy", "on-policy"):
        run = write_run(tmp_path / policy / "seed7", name=policy, seed=7, overrides=(policy,))
        (run / "evaluation").mkdir()
        (run / "evaluation.json").rename(run / "evaluation" / "evaluation.json")
    done = compare(OUT=str(tmp_path), SEEDS="7", POLICIES="off-policy on-policy")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished before") == 2 and "| on-policy" in done.stdout
    report = (tmp_path / "report.html").read_text()
    assert f"report: {tmp_path}/report.html" in done.stdout and "off-policy" in report
    assert f"{evaluation()['conditions'][0]['condition']}" in report


def test_an_unknown_policy_is_refused_before_anything_runs(tmp_path: Path) -> None:
    done = compare(OUT=str(tmp_path / "out"), POLICIES="on-policy greedy")
    assert done.returncode == 2 and "greedy" in done.stderr
    assert not (tmp_path / "out").exists()
