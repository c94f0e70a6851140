"""What is code on a page and what is prose that was set like code.

Manual pages and help files are often one `pre` from head to foot: each paragraph of it is looked
at by itself, and what reads like prose becomes a paragraph. The other way round, lines of code that
stand in one `code` element with `<br>` between them become a `pre`.
"""

from __future__ import annotations

import re
from itertools import groupby

from bs4 import Tag
from bs4.element import NavigableString

_CODE = re.compile(
    r"[;{}\\]\s*$|^[$>#%*]|^//|^/\*|^\w+\(|\S\s{5,}\S|\t|[=<>]{2}|^(?:import|def|return|set|let)\b"
)
_WORDS = 4  # of a line of prose
_MOSTLY, _SURELY = 0.5, 0.8  # of a text's letters that stand in such lines
_LONG = 40  # characters; a shorter paragraph is no prose by itself
_SHORT = 200  # of a whole `pre` of one line, which is a command
_SENTENCE = re.compile(r"[.!?:。！？][\"')\]]?\s*$")


def prose_out_of_code(page: Tag) -> None:
    """Paragraphs of each `pre` that read like prose become paragraphs of the page."""
    for pre in page.find_all("pre"):
        if pre.find("code") is not None or "highlight" in str(pre.get("class", "")):
            continue
        text = pre.get_text().expandtabs(8)
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2 and len(text) < _SHORT:
            continue
        base = min((len(line) - len(line.lstrip()) for line in lines), default=0)
        mostly = _prose(text) >= _MOSTLY
        paragraphs = [said for said in re.split(r"\n[ \t]*\n", text) if said.strip()]
        if any(_is_prose(said, mostly, base) for said in paragraphs):
            _replace(pre, [(_is_prose(said, mostly, base), said) for said in paragraphs])


def lines_of_code(page: Tag) -> None:
    """A `code` that is all of a block and has `<br>` in it becomes a `pre`."""
    for code in page.find_all(["code", "tt", "samp", "kbd"]):
        block = code.parent
        if code.find("br") is None or not isinstance(block, Tag):
            continue
        if block.name in ("p", "div", "td", "dd", "li") and (
            block.get_text().strip() == code.get_text().strip()
        ):
            for end in code.find_all("br"):
                follows = end.next_sibling
                newline = isinstance(follows, NavigableString) and str(follows).startswith("\n")
                end.replace_with(NavigableString("" if newline else "\n"))
            code.name = "pre"
            if block.name == "p":
                block.name = "div"


def _prose(text: str) -> float:
    """The share of a text's letters that stand in lines which read like prose."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if len(line.split()) >= _WORDS and not _CODE.search(line)]
    return sum(map(len, said)) / max(1, sum(map(len, lines)))


def _is_prose(paragraph: str, mostly: bool, base: int) -> bool:
    """Does it read like prose?

    Args:
        paragraph: lines without a blank one.
        mostly: most of what stands around it is prose.
        base: how far the least indented line around it is indented.
    """
    share = _prose(paragraph)
    if mostly:
        lines = paragraph.splitlines()
        deeper = min(len(line) - len(line.lstrip()) for line in lines if line.strip()) >= base + 4
        ends = _SENTENCE.search(paragraph) is not None
        return share >= (_SURELY if deeper and not ends else _MOSTLY)
    if len(paragraph.strip()) < _LONG or not _SENTENCE.search(paragraph):
        return False
    first = paragraph.strip()[0]
    return share >= (_MOSTLY if first.isupper() or first.isdigit() else _SURELY)


def _replace(pre: Tag, paragraphs: list[tuple[bool, str]]) -> None:
    """Puts paragraphs, and what is code between them, in place of a `pre`."""
    pre.clear()
    pre.name = "div"
    for prose, group in groupby(paragraphs, key=lambda one: one[0]):
        said = [text for _, text in group]
        if not prose:
            tag = Tag(name="pre")
            tag.string = "\n\n".join(said)
            pre.append(tag)
            continue
        for paragraph in said:
            tag = Tag(name="p")
            tag.string = "\n".join(" ".join(line.split()) for line in paragraph.splitlines())
            pre.append(tag)
