"""A package installer finds a set of packages for each extra that brings many.

[train] with the versions of the lock. [gateway] in the environment that Tokasaurus needs, whose
packages are of 2025.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.training.conftest import ROOT


def pins() -> dict[str, str]:
    """What modal/modal_tokasaurus.py installs beside Tokasaurus, name to version."""
    tree = ast.parse((ROOT / "modal" / "modal_tokasaurus.py").read_text())
    [listed] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PACKAGES"
    ]
    pairs = [line.split("==") for line in ast.literal_eval(listed) if "==" in line]
    return {canonicalize_name(name): version for name, version in pairs}


def _lines(extra: str) -> list[Requirement]:
    """What the core and an extra ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"][extra]]
    return [Requirement(line) for line in lines]


def test_no_bound_excludes_a_pin() -> None:
    asked = _lines("gateway")
    pinned = pins()
    assert pinned["torch"] == "2.6.0" and pinned["transformers"] == "4.53.0"
    for one in asked:
        version = pinned.get(canonicalize_name(one.name))
        assert version is None or one.specifier.contains(version), f"{one} excludes {version}"
    names = {one.name for one in asked}
    assert not names & {"verl", "ray", "TransferQueue", "pandas", "pyarrow", "plotly"}


def resolved(wheel: Path, extra: str, folder: Path, *options: object) -> dict[str, str]:
    """What pip would install, name to version, by its own resolver; nothing is installed."""
    report = folder / "report.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--dry-run"),
            *("--ignore-installed", "--quiet", "--report", str(report), *map(str, options)),
            f"cartridge-distill[{extra}] @ {wheel.as_uri()}",
        ],
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"]
        for item in json.loads(report.read_text())["install"]
    }


@pytest.mark.long
@pytest.mark.integration
@pytest.mark.timeout(1800)
def test_the_gateway_resolves_beside_tokasaurus(
    package_index: None, wheel: Path, tmp_path: Path
) -> None:
    pinned = pins()
    constraints = tmp_path / "pins.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in pinned.items()))
    found = resolved(wheel, "gateway", tmp_path, "--constraint", constraints)
    for name in ("torch", "transformers", "huggingface-hub", "fastapi", "uvicorn"):
        assert found[name] == pinned[name]
    assert "prometheus-client" in found
    assert not found.keys() & {"verl", "ray", "pandas", "plotly"}


@pytest.mark.long
@pytest.mark.integration
@pytest.mark.timeout(1800)
def test_training_resolves(package_index: None, wheel: Path, tmp_path: Path) -> None:
    """With the lock's versions. Without them pip tries versions for longer than 15 minutes."""
    lock = ROOT / "requirements" / "lock.txt"
    found = resolved(wheel, "train", tmp_path, "--constraint", lock)
    assert found["verl"] == "0.9.1"
    assert found.keys() >= {"ray", "transferqueue", "torch", "transformers", "gguf", "pandas"}
    for line in _lines("train"):
        assert line.specifier.contains(found[canonicalize_name(line.name)]), line
