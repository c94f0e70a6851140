"""Hooks of mkdocs: pages that lie outside of docs/, and links that lead out of it.

README, PLAN and the READMEs of the folders become pages of the site, below ``repository/``, with
the text that they have in the repository. A link to one of them leads to its page. A link to any
other file of the repository has no place on the site: its words stay, with the path behind them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "PLAN.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "benchmarks/gpu_bundle/README.md",
    "modal/README.md",
    "tests/README.md",
)
_LINK = re.compile(r"(?<!!)\[(?P<words>[^\]]+)\]\((?P<path>[^():\s#]*)(?P<anchor>#[^()\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the repository; mkdocs calls it once."""
    from mkdocs.structure.files import File

    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, f"repository/{name}", content=text))
    return files


def in_repository(page: str) -> str:
    """Where a page of the site lies in the repository."""
    name = page.removeprefix("repository/")
    return name if name != page else f"docs/{page}"


def site_page(path: str) -> str | None:
    """Which page of the site a file of the repository is; None when it is none."""
    if path in PAGES:
        return f"repository/{path}"
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def relinked(markdown: str, page: str) -> str:
    """The page with its links as the site has them.

    Raises:
        FileNotFoundError: a link leads to a file that is not there.
    """
    folder = posixpath.dirname(in_repository(page))
    here = posixpath.dirname(page)

    def link(found: re.Match[str]) -> str:
        if not found["path"]:
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, found["path"]))
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page}: {found[0]} leads to {path}, which is not there")
        target = site_page(path)
        if target is None:
            return found["words"] if path in found["words"] else f"{found['words']} (`{path}`)"
        relative = posixpath.relpath(target, here or ".")
        return f"[{found['words']}]({relative}{found['anchor'] or ''})"

    # Not inside blocks of code.
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """mkdocs calls it for each page."""
    return relinked(markdown, page.file.src_uri)
