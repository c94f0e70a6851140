"""A first try that goes wrong: one line, what is wrong and the fix, and no stack."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cli.mistakes import MISTAKES, Mistake, made, message, places
from tests.gateway.rig import Rig
from tests.patches.conftest import patched, pristine  # noqa: F401  (fixtures)

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, rig: Rig) -> Iterator[dict[str, str]]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        folder: Path = tmp_path_factory.mktemp("mistakes")
        yield places(folder, rig.url) | {"PORT": str(taken.getsockname()[1])}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_it_is_said_in_one_line_with_the_fix(
    mistake: Mistake,
    place: dict[str, str],
    patched: Path,  # noqa: F811
) -> None:
    if mistake.what.startswith("no GPU") and torch.cuda.is_available():
        pytest.skip("there is one here")
    done, *_ = made(mistake, place, patched)
    assert done.returncode in (1, 2, 130)
    said = message(mistake, done)
    assert all(part in said for part in mistake.said), said
    assert "Traceback" not in done.stderr and not Path(place["NEW"]).exists()
    # Nothing beside it but what it lists, that a server is waited for, and make's own line.
    expected = ("error: ", "- ", "waiting for ", "make: ***")
    assert all(line.startswith(expected) for line in done.stderr.splitlines()), done.stderr
    assert "== server" not in done.stdout and "== training" not in done.stdout
