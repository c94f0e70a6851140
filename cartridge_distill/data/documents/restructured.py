"""A reStructuredText file to the text in it, as `markdown` does it for Markdown.

Taken out: comments, directives that show an image or make a table of contents, the addresses of
links, and the marks of roles. Put in: what a substitution stands for. Underlines and lists stay as
they are; `blocks` reads them, and what is indented below `::` or a `code-block` is code there.

A `.txt` file is read so, too, if it holds directives or links of this kind.
"""

from __future__ import annotations

import re

_DIRECTIVE = re.compile(r"^([ \t]*)\.\.(?:[ \t]+(?P<said>[^\n]*))?$")
_NAMED = re.compile(
    r"(?:\|(?P<stands_for>[^|\n]+)\|[ \t]+)?(?P<name>[\w:+-]+)::[ \t]*(?P<rest>.*)$"
)
_TARGET = re.compile(r"(?:_[^\n]*:|__)(?:[ \t]|$)")
_FOOTNOTE = re.compile(r"\[[^\]\n]+\][ \t]+(?P<rest>.*)$")
_CODE = frozenset(
    ("code", "code-block", "sourcecode", "highlight", "parsed-literal", "literalinclude", "doctest")
    + ("testcode", "ipython", "productionlist", "math", "graphviz", "raw")
)
_UNSEEN = frozenset(
    (
        "image",
        "figure",
        "contents",
        "toctree",
        "index",
        "raw",
        "include",
        "meta",
        "role",
        "default-role",
    )
    + ("currentmodule", "module", "highlight", "sectnum", "target-notes", "tags", "only")
)
_LINK = re.compile(r"`(?P<said>[^`<>]*?)\s*<[^`<>]*>`_{1,2}", re.S)
_REFERENCE = re.compile(r"`(?P<said>[^`]+)`_{1,2}(?!\w)")
_WORD_REFERENCE = re.compile(r"(?<![\w`])(?P<said>\w[\w-]*\w)_{1,2}(?=[\s.,;:!?)]|$)")
_ROLE = re.compile(r"(?<!\w):[\w:+.-]+:`(?P<said>[^`]+?)(?:\s*<[^`<>]*>)?`", re.S)
_SUBSTITUTION = re.compile(r"\|(?P<said>[^|\s](?:[^|\n]*[^|\s])?)\|(?:_{1,2})?")
_LITERAL = re.compile(r"(``.+?``)", re.S)
_LOOKS_SO = re.compile(
    r"^\.\. [\w|].*::|^\.\. _[^\n]+:|`[^`<>\n]+<[^<>\n]+>`_|(?<!\w):[\w:]+:`[^`\n]+`", re.M
)


def looks_restructured(text: str) -> bool:
    """Does a text hold two directives or links of reStructuredText, or more?"""
    return sum(1 for _, _ in zip(_LOOKS_SO.finditer(text), range(2), strict=False)) == 2


def clean_restructured(text: str) -> str:
    """The text without what is not text."""
    kept: list[str] = []
    stands_for: dict[str, str] = {}
    lines = text.splitlines()
    place = 0
    while place < len(lines):
        found = _DIRECTIVE.match(lines[place])
        if found is None:
            kept.append(lines[place])
            place += 1
            continue
        end = _below(lines, place, len(found.group(1)))
        said = found.group("said") or ""
        named = _NAMED.match(said)
        if named and named.group("stands_for"):
            shown = named.group("rest") if named.group("name") in ("replace", "unicode") else ""
            stands_for[named.group("stands_for").lower()] = shown.strip()
        elif named:
            kept += _directive(named, found.group(1), lines[place + 1 : end])
        elif (note := _FOOTNOTE.match(said)) and not _TARGET.match(said):
            kept += [found.group(1) + note.group("rest"), *lines[place + 1 : end]]
        place = end
    return _inline("\n".join(kept) + "\n", stands_for)


def _below(lines: list[str], place: int, indentation: int) -> int:
    """The number of the first line that no longer belongs to the directive at `place`."""
    end = place + 1
    for number in range(place + 1, len(lines)):
        line = lines[number]
        if line.strip():
            if len(line) - len(line.lstrip()) <= indentation:
                break
            end = number + 1
    return end


def _directive(named: re.Match[str], indentation: str, below: list[str]) -> list[str]:
    """What of a directive is text: its content, as code or as prose; its title or argument."""
    name = named.group("name").rpartition(":")[2]
    while below and re.match(r"\s+:[\w-]+:", below[0]):
        below = below[1:]
    if name in _UNSEEN:
        return []
    if name in _CODE:
        return [f"{indentation}::", "", *below]
    rest = named.group("rest").strip()
    width = min((len(b) - len(b.lstrip()) for b in below if b.strip()), default=0)
    inner = [indentation + line[width:] for line in below]
    return [*([indentation + rest] if rest else []), *([""] if rest and inner else []), *inner]


def _inline(text: str, stands_for: dict[str, str]) -> str:
    def substitute(match: re.Match[str]) -> str:
        return stands_for.get(match.group("said").lower(), match.group())

    parts = _LITERAL.split(text)
    for number in range(0, len(parts), 2):
        part = _SUBSTITUTION.sub(substitute, parts[number]) if stands_for else parts[number]
        part = _ROLE.sub(lambda match: match.group("said").lstrip("~!"), part)
        part = _LINK.sub(lambda match: match.group("said"), part)
        part = _REFERENCE.sub(lambda match: match.group("said"), part)
        parts[number] = _WORD_REFERENCE.sub(lambda match: match.group("said"), part)
    return re.sub(r"\n[ \t]*\n(?:[ \t]*\n)+", "\n\n", "".join(parts))
