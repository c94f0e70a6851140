"""Licence, citation, workflow, hooks: well-formed, and in line with pyproject and the lock."""

from __future__ import annotations

import hashlib
import re
import tomllib
from typing import Any

import pytest
import yaml

import cartridge_distill
from tests.training.conftest import ROOT

# Of https://www.apache.org/licenses/LICENSE-2.0.txt, to the byte.
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def parsed(path: str) -> Any:
    return yaml.safe_load(text(path))


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads(text("pyproject.toml"))["project"]


def test_the_licence_is_the_standard_text() -> None:
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2


def test_the_package_names_the_licence_and_carries_its_files(project: dict[str, Any]) -> None:
    assert project["license"] == "Apache-2.0"
    assert set(project["license-files"]) == {"LICENSE", "NOTICE"}
    assert all((ROOT / name).is_file() for name in project["license-files"])
    # PEP 639: builds refuse a licence that is named twice.
    assert not [name for name in project["classifiers"] if name.startswith("License ::")]


def test_the_package_carries_every_kind_of_data_that_it_promises(project: dict[str, Any]) -> None:
    """A pattern that fits no file is left out of the wheel without a word; PEP 561's mark too."""
    promised = tomllib.loads(text("pyproject.toml"))["tool"]["setuptools"]["package-data"]
    for package, patterns in promised.items():
        found = {pattern: set((ROOT / package).glob(pattern)) for pattern in patterns}
        assert all(found.values()), f"{package}: patterns that fit no file: {found}"
        files = {path for path in (ROOT / package).rglob("*") if path.is_file()}
        data = {path for path in files if path.suffix not in (".py", ".pyc")}
        left_out = data - set().union(*found.values())
        assert not left_out, f"{package}: not in the wheel: {sorted(left_out)}"
    assert ("Typing :: Typed" in project["classifiers"]) == (
        "py.typed" in promised["cartridge_distill"]
    )


def test_the_notice_names_what_the_patches_quote() -> None:
    notice = text("NOTICE")
    assert "veRL 0.9.1" in notice
    assert "Copyright 2024 Bytedance Ltd. and/or its affiliates" in notice


def test_the_citation_is_complete(project: dict[str, Any]) -> None:
    citation = parsed("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"] and citation["title"]
    assert citation["license"] == project["license"]
    assert [author["name"] for author in citation["authors"]] == [
        author["name"] for author in project["authors"]
    ]
    (paper,) = citation["references"]
    assert paper["url"] == project["urls"]["Paper"]
    assert paper["url"].endswith(paper["identifiers"][0]["value"].removeprefix("arXiv:"))
    assert all({"family-names", "given-names"} == set(author) for author in paper["authors"])


def test_one_version_everywhere(project: dict[str, Any]) -> None:
    version = project["version"]
    assert cartridge_distill.__version__ == version
    assert str(parsed("CITATION.cff")["version"]) == version
    assert re.search(rf"^## \[{re.escape(version)}\]", text("CHANGELOG.md"), re.MULTILINE)


def test_the_workflow_runs_the_same_check_as_a_developer(project: dict[str, Any]) -> None:
    workflow = parsed(".github/workflows/test.yml")
    assert {"push", "pull_request"} <= set(workflow["on"])
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111, "the workflow calls it as a program"
    versions = [step["with"]["python-version"] for step in steps if "setup-python" in str(step)]
    assert len(versions) == 1
    assert f">={versions[0]}," in project["requires-python"]


def test_the_bug_form_asks_for_what_is_needed_to_answer() -> None:
    form = parsed(".github/ISSUE_TEMPLATE/bug.yml")
    assert form["name"] and form["description"]
    fields = {item["id"]: item for item in form["body"] if item["type"] != "markdown"}
    assert len(fields) == len(form["body"]) - 1, "every field needs an id of its own"
    asked = fields["doctor"]
    assert "cartridge-distill doctor" in asked["attributes"]["label"]
    assert asked["validations"]["required"] is True
    assert parsed(".github/ISSUE_TEMPLATE/config.yml")["blank_issues_enabled"] is False


def test_the_hooks_are_the_tools_of_the_lock(project: dict[str, Any]) -> None:
    (local,) = parsed(".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    assert [hook["id"] for hook in local["hooks"]] == ["ruff-check", "ruff-format", "mypy"]
    for hook in local["hooks"]:
        program = hook["entry"].split()[0]
        assert hook["language"] == "system" and program.startswith(".venv/bin/")
        tool = program.removeprefix(".venv/bin/")
        assert re.search(rf"^{tool}==\S+$", text("requirements/lock.txt"), re.MULTILINE)
        assert tool in project["optional-dependencies"]["dev"]


@pytest.mark.parametrize(
    "page", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "tests/README.md"]
)
def test_the_files_that_a_page_names_exist(page: str) -> None:
    """Paths in backquotes that end like a file of ours, from the root or from the page's folder."""
    named = re.findall(r"`([\w./-]+\.(?:md|py|toml|txt|patch|cff|sh|yml))`", text(page))
    assert named, f"{page} names no file"
    folders = [ROOT, (ROOT / page).parent]
    beside = {path.name for path in (ROOT / "tests").rglob("*.py")}
    missing = [
        name
        for name in named
        if not any((folder / name).is_file() for folder in folders) and name not in beside
    ]
    assert not missing, f"{page} names files that are not there: {missing}"
