"""The site that mkdocs makes: every page is in it, and links that leave docs/ still lead somewhere.

mkdocs itself is not needed here: `make docs` has an environment of its own.
"""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.docs.pages import ROOT, text_of


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without the tags that name Python's functions."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


@pytest.fixture(scope="module")
def config() -> Any:
    return yaml.load(text_of(ROOT / "mkdocs.yml"), Loader=_Loader)


@pytest.fixture(scope="module")
def hooks(config: Any) -> ModuleType:
    (file,) = config["hooks"]
    spec = importlib.util.spec_from_file_location("mkdocs_hooks", ROOT / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _leaves(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from _leaves(entry)


def test_every_page_is_in_the_navigation(config: Any, hooks: ModuleType) -> None:
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    brought_in = {f"repository/{name}" for name in hooks.PAGES}
    named = list(_leaves(config["nav"]))
    assert sorted(named) == sorted(pages | brought_in)
    assert config["strict"] is True


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("index.md", "[plan](../PLAN.md#next)", "[plan](repository/PLAN.md#next)"),
        ("api/loss.md", "[it](../architecture.md)", "[it](../architecture.md)"),
        ("repository/README.md", "[a](docs/results.md#x)", "[a](../results.md#x)"),
        ("repository/modal/README.md", "[s](../docs/serving.md)", "[s](../../serving.md)"),
        ("repository/README.md", "[licence](LICENSE)", "licence (`LICENSE`)"),
        ("repository/README.md", "[LICENSE](LICENSE)", "LICENSE"),
        ("data.md", "[here](#recipes)", "[here](#recipes)"),
        ("data.md", "[a](https://arxiv.org/abs/1)", "[a](https://arxiv.org/abs/1)"),
        ("data.md", "```\n[a](../PLAN.md)\n```", "```\n[a](../PLAN.md)\n```"),
    ],
)
def test_links_lead_where_the_site_has_them(
    hooks: ModuleType, page: str, link: str, expected: str
) -> None:
    assert hooks.relinked(link, page) == expected


def test_a_link_to_nothing_ends_the_build(hooks: ModuleType) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.md"):
        hooks.relinked("[a](../nothing.md)", "index.md")


def test_the_api_pages_name_modules_that_are_there() -> None:
    named = [
        module
        for page in (ROOT / "docs" / "api").glob("*.md")
        for module in re.findall(r"^::: (\S+)$", text_of(page), re.M)
    ]
    assert len(named) > 10
    files = [Path(ROOT, *module.split(".")).with_suffix(".py") for module in named]
    assert not [file for file in files if not file.is_file()]


def test_what_the_extra_asks_for_is_pinned() -> None:
    extra = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    pinned = re.findall(r"^([\w.-]+)==\S+$", text_of(ROOT / "requirements" / "docs.txt"), re.M)
    assert {re.split(r"[\[<>=]", package)[0] for package in extra["docs"]} <= set(pinned)
