"""Files of every kind, damaged in every way: what was written, or an error that names the file.

In a process whose memory is limited: a reader that believes a damaged number fails the test, and
not the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cartridge_distill.cartridge.checkpoint import FORMATS

SEED = os.environ.get("ATTACK_SEED", "0")
QUICK = 60
# As they are named in files.py, whose imports take seconds.
KINDS = (
    *FORMATS,
    *("training state", "data position", "tracker", "history", "recipe", "journal"),
    *("documents", "documents table", "evaluation table", "versions"),
)


def attack(kind: str, folder: Path, *options: str, timeout_s: float) -> dict[str, dict[str, int]]:
    """The counts of each kind."""
    command = [sys.executable, "-m", "tests.attack.files", kind, str(folder), "--seed", SEED]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line.pop("of"): line for line in lines}


@pytest.mark.integration
def test_a_damaged_file_is_refused_by_name_or_right(tmp_path: Path) -> None:
    found = attack("all", tmp_path, "--count", str(QUICK), timeout_s=600)
    assert list(found) == list(KINDS)
    for counts in found.values():
        assert counts["bit: refused"] and counts["whole: refused"]


@pytest.mark.long
@pytest.mark.integration
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_and_every_beginning(kind: str, tmp_path: Path) -> None:
    print(f"\n{attack(kind, tmp_path, timeout_s=7000)}")
