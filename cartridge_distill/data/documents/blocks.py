"""The blocks of a text: headings, code and prose, read by the rules of the kind of text it is.

*Markdown* (also what `reading` makes of HTML): a heading is `# ...` or a line underlined with
`===` or `---`; code stands in a fence, or after a blank line indented by four: in a list item, or
in a definition (`:   ...`), by four more than its text.

*Plain text*: a line of `~~~~` fences nothing, and `# command` is no heading. Code is what is
indented below a paragraph that ends in `::`, and nothing else. A heading is a line underlined with
one repeated sign, as in reStructuredText (with a line of it above as well, or not; each style that
appears is one level deeper), a line in capitals (or of a script without them) over lines that are
indented, as in a manual page, or a line whose number continues the numbers of the headings before
(`numbered.py`).

*Typeset* (a PDF in which the fonts say what is code): as plain text, and code is also each
paragraph whose lines are all indented by four.

In all, a short line by itself that begins like a title, does not end like a sentence and stands
over ordinary prose is a heading, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from cartridge_distill.data.documents.numbered import numbered_headings
from cartridge_distill.util.errors import DocumentError

Form = Literal["markdown", "plain", "typeset"]

PLAIN_HEADING = 6


@dataclass(frozen=True)
class Block:
    """A heading, a piece of code, or lines of prose; `text[start:end]`.

    Attributes:
        depth: of a heading, 1 to 6; 0 otherwise.
        title: of a heading.
        code: each line is a unit.
    """

    start: int
    end: int
    depth: int = 0
    title: str = ""
    code: bool = False


_FENCE = re.compile(r"[ \t]*(?:(`{3,})[^`]*|(~{3,}).*)$")
_HASHES = re.compile(r" {0,3}(#{1,6})[ \t]+(?=\S)")
_SETEXT = re.compile(r" {0,3}(=+|-{2,})\s*$")
_RULE = re.compile(r"\s*([!-/:-@\[-`{-~])\1+\s*$")
ITEM = re.compile(r"[ \t]*(?:[-*+•–][ \t]|\d{1,3}[.)][ \t]|\|)")
_LIST = re.compile(r"[ \t]*(?:[-*+•–:]|\d{1,3}[.)])(?:[ \t]{1,4}(?=\S)|[ \t])")
_TITLE_LIKE = re.compile(r"[\W\d]*[^\W\d_].*[^.!?:;,\s。．！？：；，、…]$")
_NO_TITLE = re.compile(r"[#$>%]|-+\w|--|.*\S@\S")  # a command, an option, a signature
_EMPHASIS = re.compile(r"\*+|`+")
_COLUMNS = re.compile(r"\S {3,}\S|\||\t")
_LONGEST_TITLE = 80
_SHORTEST_RULE, _LONGEST_RULE = 0.75, 1.2  # of the title above it
_DEEPEST = 5  # of an underlined heading


def blocks(text: str, form: Form) -> list[Block]:
    """The blocks of a text in order; blank lines between them belong to none.

    Raises:
        DocumentError: an unknown form.
    """
    found = marked_blocks(text, form)
    with_titles = [*found]
    for number, (block, after) in enumerate(pairwise(found)):
        if form == "typeset" and after.code:
            continue  # its headings are known; this says what the code is
        if _titles(text, block, form) and not after.depth and not _titles(text, after, form):
            title = _bare(text[block.start : block.end], form)
            with_titles[number] = Block(block.start, block.end, PLAIN_HEADING, title)
    return with_titles


def marked_blocks(text: str, form: Form) -> list[Block]:
    """The same with those headings only that are marked as such.

    Raises:
        DocumentError: an unknown form.
    """
    if form not in get_args(Form):
        raise DocumentError(
            f"the form {form!r} is unknown; fix: one of {', '.join(get_args(Form))}"
        )
    return list(_markdown(text) if form == "markdown" else _plain(text, form == "typeset"))


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """(offset, line with its end)."""
    offset = 0
    for line in text.splitlines(keepends=True):
        yield offset, line
        offset += len(line)


def _bare(title: str, form: Form) -> str:
    """A heading's words, without the marks of emphasis and code around some of them."""
    title = title.strip()
    return (_EMPHASIS.sub("", title).strip() or title) if form == "markdown" else title


def _titles(text: str, block: Block, form: Form) -> bool:
    """Does this block look like a title without a mark?"""
    if block.end - block.start > 2 * _LONGEST_TITLE:
        return False
    line = _bare(text[block.start : block.end], form)
    if block.depth or block.code or "\n" in line or len(line) > _LONGEST_TITLE:
        return False
    if _NO_TITLE.match(line):
        return False
    first = next((char for char in line if char.isalpha()), "a")
    return bool(_TITLE_LIKE.match(line)) and not first.islower() and not ITEM.match(line)


# --- Markdown -------------------------------------------------------------------------------------


def _markdown(text: str) -> Iterator[Block]:
    start: int | None = None  # of the prose that is being collected
    end = 0
    fence: str | None = None
    fence_start = 0
    indented: int | None = None  # where indented code began
    columns: list[int] = []  # where the text of the open list items begins, the outermost first
    for offset, line in lines_of(text):
        after = offset + len(line)
        column = _column(line)
        if fence is not None:
            if _closes(line, fence):
                yield Block(fence_start, after, code=True)
                fence = None
            continue
        if indented is not None:
            if column >= 4 + (columns[-1] if columns else 0) and line.strip():
                end = after
                continue
            if not line.strip():
                continue
            yield Block(indented, end, code=True)
            indented = None
        item = _LIST.match(line)
        body = line[item.end() :] if item else line
        opening = _FENCE.match(body.rstrip("\n"))
        hashes = _HASHES.match(line)
        if opening and not item and column >= 4 and not columns:
            opening = None
        if start is not None and (opening or hashes or not line.strip()):
            yield _markdown_prose(text, start, end)
            start = None
        if line.strip() and start is None:
            while columns and column < columns[-1]:
                columns.pop()
        if opening:
            fence, fence_start = opening.group(1) or opening.group(2), offset
        elif hashes:
            title = line[hashes.end() :].strip()
            title = _bare(title.rstrip("# \t") or title, "markdown")
            yield Block(offset, after, len(hashes.group(1)), title)
            columns = []
        elif line.strip():
            if start is None and column >= 4 + (columns[-1] if columns else 0):
                indented, end = offset, after
                continue
            start = offset if start is None else start
            end = after
        if item and not hashes:
            columns = [known for known in columns if known <= column]
            columns.append(len(line[: item.end()].expandtabs(4)))
    if fence is not None:
        yield Block(fence_start, len(text), code=True)
    elif indented is not None:
        yield Block(indented, end, code=True)
    elif start is not None:
        yield _markdown_prose(text, start, end)


def _column(line: str) -> int:
    """Where the text of a line begins, with tabs of four columns."""
    wide = line.expandtabs(4)
    return len(wide) - len(wide.lstrip(" "))


def _closes(line: str, fence: str) -> bool:
    bare = line.strip()
    return bare.startswith(fence) and not bare.strip(fence[0])


def _markdown_prose(text: str, start: int, end: int) -> Block:
    lines = text[start:end].splitlines()
    underline = _SETEXT.match(lines[1]) if len(lines) == 2 else None
    if underline:
        depth = 1 if underline.group(1).startswith("=") else 2
        return Block(start, end, depth, _bare(lines[0], "markdown"))
    return Block(start, end)


# --- plain text -----------------------------------------------------------------------------------


def _plain(text: str, typeset: bool) -> Iterator[Block]:
    styles: list[tuple[str, bool]] = []  # of underlines, in the order of their appearance
    numbered = numbered_headings(text)
    literal: int | None = None  # the indentation of a paragraph that announces code
    for paragraph in _paragraphs(text):
        if literal is not None and min(_column(line) for _, line in paragraph) > literal:
            yield Block(paragraph[0][0], _end(paragraph[-1]), code=True)
            continue
        if typeset and all(line.startswith("    ") for _, line in paragraph):
            yield Block(paragraph[0][0], _end(paragraph[-1]), code=True)
            continue
        literal = _column(paragraph[-1][1]) if paragraph[-1][1].rstrip().endswith("::") else None
        for part in _split(paragraph, numbered):
            heading = numbered.get(part[0][0])
            if heading is None:
                yield from _plain_paragraph(part, styles)
                continue
            lines = 2 if len(part) > 1 and _underlined(part, 0) is not None else 1
            yield Block(part[0][0], _end(part[lines - 1]), *heading)
            if part[lines:]:
                yield Block(part[lines][0], _end(part[-1]))


def _split(
    paragraph: list[tuple[int, str]], numbered: dict[int, tuple[int, str]]
) -> Iterator[list[tuple[int, str]]]:
    """The same lines; each numbered heading begins a part of its own."""
    part: list[tuple[int, str]] = []
    for line in paragraph:
        if line[0] in numbered and part:
            yield part
            part = []
        part.append(line)
    yield part


def _paragraphs(text: str) -> Iterator[list[tuple[int, str]]]:
    """Runs of lines that are not blank."""
    found: list[tuple[int, str]] = []
    for offset, line in lines_of(text):
        if line.strip():
            found.append((offset, line))
        elif found:
            yield found
            found = []
    if found:
        yield found


def _plain_paragraph(
    lines: list[tuple[int, str]], styles: list[tuple[str, bool]]
) -> Iterator[Block]:
    """A heading at its beginning, if there is one, and the rest as prose."""
    title = 0
    rule = _RULE.match(lines[0][1])
    if rule and len(lines) > 2 and _underlined(lines, 1) == rule.group(1):
        title = 1
    style = _underlined(lines, title)
    rest = lines
    if style is not None:
        key = (style, title == 1)
        if key not in styles:
            styles.append(key)
        depth = min(_DEEPEST, styles.index(key) + 1)
        rest = lines[title + 2 :]
        yield Block(lines[0][0], _end(lines[title + 1]), depth, lines[title][1].strip())
    elif _capitals_over_indented(lines):
        rest = lines[1:]
        yield Block(lines[0][0], _end(lines[0]), PLAIN_HEADING, lines[0][1].strip())
    if rest:
        yield Block(rest[0][0], _end(rest[-1]))


def _end(line: tuple[int, str]) -> int:
    return line[0] + len(line[1])


def _underlined(lines: list[tuple[int, str]], number: int) -> str | None:
    """The sign that a title's line is underlined with, if it is."""
    if number + 1 >= len(lines) or len(lines[number][1]) > 2 * _LONGEST_TITLE:
        return None
    title = lines[number][1].strip()
    rule = _RULE.match(lines[number + 1][1])
    if rule is None or len(title) > _LONGEST_TITLE or _COLUMNS.search(title):
        return None
    if not any(char.isalnum() for char in title) or _NO_TITLE.match(title) or title[-1] in "{;,(":
        return None
    # A rule over the whole width stands over and under a block of code as well; over a title only
    # where the title is in its middle.
    width = len(lines[number + 1][1].strip())
    longest = 200 if lines[number][1][0].isspace() else _LONGEST_RULE * len(title) + 4
    return rule.group(1) if _SHORTEST_RULE * len(title) <= width <= longest else None


def _capitals_over_indented(lines: list[tuple[int, str]]) -> bool:
    if len(lines) < 2 or lines[0][1][0].isspace() or not lines[1][1][0].isspace():
        return False
    title = lines[0][1].strip()
    letters = [char for char in title if char.isalpha()]
    if len(title) > _LONGEST_TITLE:
        return False
    if title.isupper():
        return len(letters) >= 3
    return _has_no_case(title) and bool(_TITLE_LIKE.match(title)) and _column(lines[1][1]) >= 4


def _has_no_case(title: str) -> bool:
    """Letters of a script without capitals stand in it, and no small letter."""
    letters = [char for char in title if char.isalpha()]
    return any(char.lower() == char.upper() for char in letters) and not any(
        char.islower() for char in letters
    )
