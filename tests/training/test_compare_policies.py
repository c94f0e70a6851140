"""The script of the comparison, which calls the study (tests/training/study)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.training.conftest import ROOT

SCRIPT = ROOT / "training" / "compare_policies.sh"


def compare(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_it_runs_the_grid_of_the_demos_record(tmp_path: Path) -> None:
    """Up to the table of runs that are not there: the grid was read, and the folder passed on."""
    done = compare("--table-only", "--draft", OUT=str(tmp_path / "out"))
    assert done.returncode == 1
    run = tmp_path / "out" / "demo-record" / "off-policy" / "seed0"
    assert f"{run} has no metrics.jsonl: the run is not finished" in done.stderr


def test_a_variable_that_the_grid_says_now_is_refused(tmp_path: Path) -> None:
    done = compare(OUT=str(tmp_path / "out"), POLICIES="on-policy greedy")
    assert done.returncode == 2 and "POLICIES" in done.stderr and "GRID" in done.stderr
    assert not (tmp_path / "out").exists()


def test_help_says_what_may_be_set() -> None:
    done = compare("--help")
    assert done.returncode == 0 and "GRID" in done.stdout and "training.study" in done.stdout
