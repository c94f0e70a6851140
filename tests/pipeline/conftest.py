"""A small document with questions, and a folder of plain text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.patches.conftest import patched, pristine  # noqa: F401  (fixtures)

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
