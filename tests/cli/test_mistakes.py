"""A first try that goes wrong: one line, what is wrong and the fix, and no stack."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cli.mistakes import MISTAKES, Mistake, made, places

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        folder: Path = tmp_path_factory.mktemp("mistakes")
        yield places(folder) | {"PORT": str(taken.getsockname()[1])}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_it_is_said_in_one_line_with_the_fix(mistake: Mistake, place: dict[str, str]) -> None:
    if mistake.what == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one here")
    done, *_ = made(mistake, place)
    assert done.returncode in (1, 2) and not done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert all(part in lines[0] for part in mistake.said), lines[0]
