"""Gateways of their own, for the tests that end them or need other settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gateway.rig import Rig

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
