"""[gateway] installs into the environment that Tokasaurus needs, whose packages are of 2025."""

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


def test_no_bound_excludes_a_pin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["gateway"]]
    asked = [Requirement(line) for line in lines]
    pinned = pins()
    assert pinned["torch"] == "2.6.0" and pinned["transformers"] == "4.53.0"
    for one in asked:
        version = pinned.get(canonicalize_name(one.name))
        assert version is None or one.specifier.contains(version), f"{one} excludes {version}"
    names = {one.name for one in asked}
    assert not names & {"verl", "ray", "TransferQueue", "pandas", "pyarrow", "plotly"}


@pytest.mark.long
@pytest.mark.integration
def test_the_resolver_finds_a_set(wheel: Path, tmp_path: Path) -> None:
    """pip's own resolver, by the metadata of a package index; nothing is installed."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    asked = subprocess.run([*pip, "index", "versions", "fastapi"], capture_output=True, timeout=60)
    if asked.returncode != 0:
        pytest.skip("no package index can be reached")
    pinned = pins()
    constraints = tmp_path / "pins.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in pinned.items()))
    done = subprocess.run(
        [
            *(*pip, "install", "--dry-run", "--ignore-installed", "--quiet"),
            *("--report", str(tmp_path / "report.json"), "--constraint", str(constraints)),
            f"cartridge-distill[gateway] @ {wheel.as_uri()}",
        ],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    found = {
        canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"]
        for item in report["install"]
    }
    for name in ("torch", "transformers", "huggingface-hub", "fastapi", "uvicorn"):
        assert found[name] == pinned[name]
    assert not found.keys() & {"verl", "ray", "pandas", "plotly"}
