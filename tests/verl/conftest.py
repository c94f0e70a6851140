"""Engines for the tests that build some, and a world for whole runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.verl.engine_rig import build_engine, process_group

if TYPE_CHECKING:
    from tests.verl.authors import Asked
    from tests.verl.world import World


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    with process_group():
        yield


@pytest.fixture
def build(group: None, model_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """:func:`build_engine` over the tiny Llama, in a process group of one."""
    return partial(build_engine, model_folder, tmp_path)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A server, a proxy before it, and data: what a whole run needs."""
    from tests.verl.world import made_world

    with made_world(tmp_path) as made:
        yield made


@pytest.fixture
def asked(world: World) -> Asked:
    """What comes to the world's server, by author."""
    from tests.verl.authors import Asked

    return Asked(world)
