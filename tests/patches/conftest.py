"""Trees to patch: copies of the installed veRL, with this project's patches taken off."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.training.rows import write_rows
from verl_patches import manage


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds `verl/` as the release ships it. Not to be written to."""
    installed = manage.find_tree()
    root = tmp_path_factory.mktemp("pristine")
    shutil.copytree(
        installed.root / "verl", root / "verl", ignore=shutil.ignore_patterns("__pycache__")
    )
    manage.revert(manage.find_tree(root))
    return root


@pytest.fixture
def tree(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the files that the patches touch, and of the version, free to be written to."""
    root = tmp_path / "tree"
    wanted = {"verl/version/version"}
    for patch in manage.patch_files():
        wanted |= set(manage.patched_paths(patch))
    for path in sorted(wanted):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(pristine / path, root / path)
    return root


@pytest.fixture(scope="session")
def patched(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds all of `verl/` with the patches on. Not to be written to."""
    root = tmp_path_factory.mktemp("patched")
    shutil.copytree(pristine / "verl", root / "verl")
    manage.apply(manage.find_tree(root))
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "my data, v2"
    folder.mkdir()
    write_rows(folder)
    return folder
