"""A study small enough for a test: a tiny model, a short document, two arms of four steps."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import save_model, tiny_model

TEXT = (
    "# The harbour\n\nThe harbour master keeps the keys of the north gate in a green box.\n\n"
    "The lamp on the pier was built by Marten Holt in the year of the great storm.\n\n"
    "# The boats\n\nSeven boats lie at the quay, and the oldest of them is called the Swallow.\n\n"
    "A boat that comes after dark has to show two lights and wait for the pilot.\n"
)
QUESTIONS = [
    {"question": "Where are the keys?", "answer": "in a green box", "kind": "one place"},
    {"question": "Who built the lamp?", "answer": "Marten Holt", "kind": "one place"},
    {
        "question": "How many boats are there?",
        "answer": "Seven",
        "also": ["7"],
        "kind": "two places",
    },
]


def write_model(folder: Path) -> Path:
    """The tiny Llama, with room for the document."""
    save_model(tiny_model(max_position_embeddings=1024), folder / "model")
    return folder / "model"


def write_texts(folder: Path, use: str = "tuning") -> Path:
    """A folder as ``training/study/texts``, of one document: ``harbour``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "harbour.md").write_text(TEXT)
    (folder / "harbour.questions.json").write_text(json.dumps(QUESTIONS))
    about = {"title": "The harbour", "language": "English", "source": "made up", "licence": "none"}
    sha256 = hashlib.sha256(TEXT.encode()).hexdigest()
    entry = {"file": "harbour.md", "sha256": sha256, "use": use, "copyright": "none", **about}
    (folder / "index.yaml").write_text(yaml.safe_dump({"harbour": entry}))
    return folder


def grid_of(model: Path, **changes: Any) -> dict[str, Any]:
    """The content of a grid file."""
    return {
        "model": str(model),
        "documents": ["harbour"],
        "seeds": [1],
        "steps": 4,
        "batch": 3,
        "response_tokens": 5,
        "settings": {"num_tokens": 64},
        "arms": {"student": {"on_policy_fraction": 1.0}, "teacher": {"on_policy_fraction": 0.0}},
        "evaluate_at": [2],
        "measures": ["own_text"],
        "measure_tokens": 6,
        "save_every": 1,
        "gate_points": -100.0,
        **changes,
    }


def write_grid(path: Path, model: Path, **changes: Any) -> Path:
    """A grid file."""
    path.write_text(yaml.safe_dump(grid_of(model, **changes)))
    return path
