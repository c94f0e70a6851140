"""One gateway for the tests that leave it as they found it; others start their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gateway.rig import Rig


@pytest.fixture(scope="module")
def rig(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Small limits, so that they can be reached."""
    folder = tmp_path_factory.mktemp("gateway")
    with Rig(
        folder,
        model_folder,
        *("--max-inflight", 6, "--max-request-tokens", 400, "--max-request-bytes", 20_000),
        *("--max-choices", 4, "--max-cartridge-tokens", 64, "--keep-versions", 3),
    ) as running:
        yield running


StartRig = Callable[..., Rig]


@pytest.fixture
def start_rig(model_folder: Path, tmp_path: Path) -> Iterator[StartRig]:
    """A function that makes a gateway of its own; it is stopped at the end."""
    made: list[Rig] = []

    def start(*options: object, wait: bool = True, server: tuple[str, ...] = ()) -> Rig:
        made.append(Rig(tmp_path / f"rig{len(made)}", model_folder, *options, server=server))
        return made[-1].start(wait)

    yield start
    for one in made:
        one.__exit__(None, None, None)
