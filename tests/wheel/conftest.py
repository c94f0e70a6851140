"""The wheel, built of a copy of this checkout and installed where the checkout cannot be seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.training.conftest import ROOT, child_environment

# What the build reads; the rest of the checkout must not be needed.
_BUILT_OF = (
    "cartridge_distill",
    "verl_patches",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "NOTICE",
)

# In a child: modules of some packages are not found, as where they are not installed.
_WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    names = {names!r}

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.split(".")[0] in cls.names:
            return None
        return super().find_spec(fullname, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


@dataclass(frozen=True)
class Installed:
    """The installed wheel in ``folder``, and an empty working directory."""

    folder: Path
    work: Path

    def environment(self, **extra: str) -> dict[str, str]:
        inherited = child_environment(**extra)
        return {**inherited, "PYTHONPATH": str(self.folder), "PYTHONSAFEPATH": "1"}

    def run(
        self, *arguments: object, without: Sequence[str] = (), timeout: float = 200, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """``cartridge-distill`` with some arguments.

        Args:
            without: modules that the command shall not find.
        """
        start = "from cartridge_distill.cli.main import app; app()"
        return self.python(start, *arguments, without=without, timeout=timeout, **extra)

    def python(
        self,
        script: str,
        *arguments: object,
        without: Sequence[str] = (),
        timeout: float = 200,
        **extra: str,
    ) -> subprocess.CompletedProcess[str]:
        """A script, in the same circumstances."""
        script = _WITHOUT.format(names=set(without)) + script
        return subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            env=self.environment(**{"COLUMNS": "200", **extra}),
            cwd=self.work,
            capture_output=True,
            text=True,
            timeout=timeout,
        )


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's file; built without network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in _BUILT_OF:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    [found] = folder.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel, installed beside the packages of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    _pip("install", "--no-deps", "--no-index", "--no-compile", "--target", str(folder), str(wheel))
    return Installed(folder, tmp_path_factory.mktemp("empty"))


@pytest.fixture(scope="session")
def package_index() -> None:
    """Skips where there is none: what installs packages, or resolves them, asks one."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    asked = subprocess.run([*pip, "index", "versions", "fastapi"], capture_output=True, timeout=60)
    if asked.returncode != 0:
        pytest.skip("no package index can be reached")


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    environment = {**os.environ, "PIP_NO_INDEX": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
