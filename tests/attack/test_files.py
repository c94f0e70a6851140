"""Files of every kind, damaged in every way: what was written, or an error that names the file.

In a process each, whose memory is limited: a reader that believes a damaged number fails the test,
and not the machine.
"""

from __future__ import annotations

import json
import os
import re
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


def attack(kind: str, folder: Path, *options: str, timeout_s: float) -> dict[str, int]:
    """The counts of one run."""
    command = [sys.executable, "-m", "tests.attack.files", kind, str(folder), "--seed", SEED]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr[-4000:]
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


@pytest.mark.integration
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_by_name_or_right(kind: str, tmp_path: Path) -> None:
    counts = attack(kind, tmp_path, "--count", str(QUICK), timeout_s=600)
    assert counts["bit: refused"] and sum(counts.values()) > 20


@pytest.mark.long
@pytest.mark.integration
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_and_every_beginning(kind: str, tmp_path: Path) -> None:
    counts = attack(kind, tmp_path, timeout_s=7000)
    print(f"\n{kind}: {counts}")


def test_all_kinds_are_tried() -> None:
    source = Path(__file__).with_name("files.py").read_text()
    known = source.partition("KINDS: dict")[2].partition("\n}\n")[0]
    assert re.findall(r'^    "([a-z ]+)": Kind', known, re.MULTILINE) == list(KINDS)
