"""A tiny model in a folder, a server over it, and veRLs, patched and not, for child processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cartridge_distill.model.loading import load_model
from cartridge_distill.server.running import BackgroundServer
from cartridge_distill.server.settings import ServerSettings
from tests.patches.conftest import patched, pristine  # noqa: F401  (fixtures)
from tests.tiny import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def server(model_folder: Path, tmp_path: Path) -> Iterator[BackgroundServer]:
    """The embedded server over it; cartridges from ``tmp_path / "cartridges"``."""
    folder = tmp_path / "cartridges"
    folder.mkdir()
    settings = ServerSettings(cartridge_dir=folder, model_name="tiny")
    with BackgroundServer(load_model(model_folder), byte_tokenizer(), settings) as running:
        yield running


def child_environment(verl: Path | None = None, **extra: str) -> dict[str, str]:
    """The environment of a script under test.

    Args:
        verl: a folder that holds the ``verl/`` to be imported; None takes the installed one.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        # A make that is started from a test is no part of the make that runs the tests.
        if not name.startswith(("TOKASAURUS_", "MODAL_", "RAY_", "VERL_", "MAKE", "MFLAGS"))
    }
    path = [str(verl)] if verl is not None else []
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join([*path, str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **extra,
    }


@pytest.fixture
def run_python() -> Run:
    """Runs this Python with some arguments; its output is text."""

    def run(
        *arguments: object, verl: Path | None = None, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=child_environment(verl, **extra),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
        )

    return run
