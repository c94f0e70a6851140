"""A launcher whose training is a line of shell."""

from __future__ import annotations

import pytest

from verl_patches import launch
from verl_patches.launching.settings import Run


def failing(run: Run, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """In veRL's place, a shell."""
    monkeypatch.setattr(launch, "command", lambda _: ["bash", "-c", script])
