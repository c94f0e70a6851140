"""The Markdown pages of the repository: their links, headings, code and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S
)
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+(?:\([^()\s]*\))?)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.M)
_PROGRAM = re.compile(
    r"(?:\w+=\S*\s+)*(?:cartridge-distill|make|bash|pytest|(?:\S*/)?python3?|modal|torchrun)\b"
)

_OTHERS = ROOT / "training" / "study" / "texts"  # documents of other projects, as they are


def pages() -> list[Path]:
    """Every page of this project that a reader of the repository may open."""
    folders = ("docs", "benchmarks", "modal", "tests", "verl_patches", "training")
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.md"))]
    own = [path for path in found if path.parent != _OTHERS or path.name == "README.md"]
    return [*sorted(ROOT.glob("*.md")), *own]


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """The page without its blocks of code."""
    return _FENCE.sub("", text_of(page))


def links_of(page: Path) -> list[str]:
    """Targets of all links and pictures."""
    return _LINK.findall(_INLINE.sub("", prose_of(page)))


def anchors_of(page: Path) -> set[str]:
    """Anchors of the page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in _HEADING.findall(prose_of(page)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number, name = 0, anchor
        while name in found:
            number += 1
            name = f"{anchor}-{number}"
        found.add(name)
    return found


def inline_code_of(page: Path) -> list[str]:
    """What stands in backquotes, on one line each."""
    return [" ".join(code.split()) for code in _INLINE.findall(prose_of(page))]


@dataclass(frozen=True)
class Command:
    """One command of a page.

    Attributes:
        page: where it stands.
        words: the program and its arguments, without the environment before them.
    """

    page: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {shlex.join(self.words)}"

    @property
    def options(self) -> list[str]:
        """Names of its long options, up to what another program gets (``--``)."""
        words = self.words[: self.words.index("--")] if "--" in self.words else self.words
        return [word.split("=")[0] for word in words if re.match(r"--\w", word)]


def _parsed(page: Path, line: str) -> Iterator[Command]:
    """The commands of one line of shell; what is no command of ours gives none."""
    for part in re.split(r"\$\(|&&|\|\||[;|&)](?=\s|$)|(?<=\w)\)", line):
        part = part.strip()
        if not _PROGRAM.match(part):
            continue
        try:
            words = shlex.split(part, comments=True)
        except ValueError:
            words = part.split()  # an apostrophe of a sentence, or a quotation that goes on
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words:
            yield Command(page, tuple(words))


def shell_blocks(page: Path) -> list[str]:
    """The bodies of all bash blocks."""
    return [m["body"] for m in _FENCE.finditer(text_of(page)) if m["language"] in ("bash", "sh")]


def commands_in(page: Path, shell: str) -> list[Command]:
    """Every command of a block of shell; lines that go on behind a backslash are joined."""
    lines = re.sub(r" *\\\n\s*", " ", shell).splitlines()
    return [found for line in lines for found in _parsed(page, line)]


def commands_of(page: Path) -> list[Command]:
    """Every command in the page's blocks of shell and in its backquotes."""
    in_blocks = [found for body in shell_blocks(page) for found in commands_in(page, body)]
    return in_blocks + [found for code in inline_code_of(page) for found in _parsed(page, code)]


def marked_blocks(page: Path, name: str) -> list[str]:
    """The blocks of shell behind the comment ``<!-- commands: NAME -->``, in order."""
    mark = re.escape(f"<!-- commands: {name} -->")
    return re.findall(rf"^{mark}\n```bash\n(.*?)^```$", text_of(page), re.M | re.S)


def python_blocks(page: Path) -> list[str]:
    """The blocks of Python, in order."""
    return re.findall(r"^```python\n(.*?)^```$", text_of(page), re.M | re.S)
