"""A small document with questions, a folder of plain text, and commands typed over them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.patches.conftest import patched, pristine  # noqa: F401  (fixtures)
from tests.training.conftest import child_environment

SMALL = ["--tokens", "32", "--steps", "2", "--batch", "4", "--response-tokens", "4"]
SMALL += ["--threads", "1", "--device", "cpu"]
Typed = Callable[..., "subprocess.CompletedProcess[str]"]
WORDS = (
    "The harbour master keeps the keys of the old museum.",
    "He opens it at nine on weekdays, and at noon on Sundays.",
    "Visitors leave their coats at the door.",
)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A record in LongHealth's schema, short enough for the tiny model's context."""
    question = {
        "No": 0,
        "question": "When does it open on Sundays?",
        **{f"answer_{letter}": text for letter, text in zip("abcde", _OPTIONS, strict=True)},
        "correct": "At noon",
        "answer_location": {},
    }
    path = tmp_path / "museum.json"
    path.write_text(
        json.dumps(
            {
                "museum": {
                    "name": "The museum",
                    "birthday": "1900-01-01",
                    "diagnosis": "none",
                    "texts": {"text_0": " ".join(WORDS)},
                    "questions": [question, {**question, "question": "And on a Sunday?"}],
                }
            }
        )
    )
    return path


_OPTIONS = ("At nine", "At noon", "At ten", "Never", "At dusk")


@pytest.fixture
def handbook(tmp_path: Path) -> Path:
    """Two documents without questions."""
    folder = tmp_path / "handbook"
    folder.mkdir()
    (folder / "a.txt").write_text(" ".join(WORDS))
    (folder / "b.txt").write_text(" ".join(reversed(WORDS)))
    return folder


@pytest.fixture
def typed(
    patched: Path,  # noqa: F811
    tmp_path: Path,
) -> Typed:
    """Types a command of ``cartridge-distill`` in ``tmp_path``; returns its end."""

    def run(*words: object, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cartridge_distill.cli.main", *map(str, words)],
            env=child_environment(patched, **extra),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
        )

    return run
