"""A Markdown file to the text in it: what is markup for a program or a browser goes.

Taken out, outside of code: front matter (YAML between `---`, TOML between `+++`), HTML comments
and tags, images and badges, the marks of quotations, the addresses of links, definitions of
addresses, and lists of contents (lists whose items are all links to places of the page itself).
Everything else, the marks of headings, lists, tables and emphasis included, is as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Set

import yaml

from cartridge_distill.data.documents.blocks import marked_blocks
from cartridge_distill.data.documents.page_marks import power

_FRONT = re.compile(r"\A(---|\+\+\+)[ \t]*\n(.*?)^(?:\1|\.\.\.)[ \t]*$\n?", re.S | re.M)
_NOTHING = ("", "~", "null")  # in YAML
_TOML_TITLE = re.compile(r"""^title\s*=\s*["'](.+)["']\s*$""", re.M)
_QUOTE = re.compile(r"^ {0,3}>[> ]*(?<=[> ])", re.M)
_COMMENT = (re.compile(r"<!--.*?-->", re.S), re.compile("-->"))
_CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", re.S)
_LABEL = r"\[(?P<said>(?:[^\[\]\\]|\\.|\[[^\[\]]*\])*)\]"  # one pair of brackets may be inside
_ADDRESS = r"\((?:<[^<>\n]*>|(?:[^()\s\\]|\\.|\([^()\s]*\))*)(?:\s+(?:\"[^\"]*\"|'[^']*'))?\s*\)"
_TARGET = rf"(?:{_ADDRESS}|\[(?P<label>[^\[\]\n]*)\])"
_IMAGE = re.compile(rf"!{_LABEL}{_TARGET}")
_LINK = re.compile(rf"(?<![!\\]){_LABEL}{_TARGET}")
_DEFINITION = re.compile(r"^ {0,3}\[(?!\^)([^\[\]\n]+)\]:[ \t]*\S+[^\n]*\n?", re.M)
_CONTENTS = re.compile(
    r"(?:^[ \t]*(?:[-*+]|\d+[.)])[ \t]+\[[^\n]*?\]\(#[^\s()]*\)[ \t]*\n?){3,}", re.M
)
_CONTENTS_HEADING = re.compile(
    r"^ {0,3}#{1,6}[ \t]+(?:table of )?contents[ \t#:]*\n\s*(?=^ {0,3}#|\Z)", re.I | re.M
)
_TAGS = (  # of HTML; what may as well be a placeholder (<title>, <output>) is not among them
    *("a", "abbr", "acronym", "address", "article", "aside", "audio", "b", "bdi", "bdo", "big"),
    *("blockquote", "body", "br", "button", "canvas", "caption", "center", "cite", "code", "col"),
    *("colgroup", "dd", "del", "details", "dfn", "dir", "div", "dl", "dt", "em", "embed"),
    *("fieldset", "figcaption", "figure", "font", "footer", "form", "h1", "h2", "h3", "h4", "h5"),
    *("h6", "header", "hgroup", "hr", "html", "i", "iframe", "img", "ins", "kbd", "li", "main"),
    *("mark", "nav", "nobr", "noscript", "ol", "p", "picture", "pre", "q", "rp", "rt", "ruby"),
    *("s", "samp", "section", "small", "source", "span", "strike", "strong", "sub", "summary"),
    *("sup", "svg", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "tt", "u", "ul", "var"),
    *("video", "wbr"),
)
_UNSEEN = [
    (
        re.compile(rf"<{name}\b[^<>]*>.*?</{name}\s*>", re.I | re.S),
        re.compile(rf"</{name}\s*>", re.I),
    )
    for name in ("script", "style", "svg", "template")
]
_FRACTION = re.compile(r"(\d?)<sup>(\d+)</sup>\s*[/\u2044]\s*<sub>(\d+)</sub>", re.I)
_MATH_BEGINS = re.compile(r"\$\$|\$(?![\s\d])|\\\(|\\\[")
_MATH = {
    "$$": re.compile(r"\$\$.+?\$\$", re.S),
    "$": re.compile(r"\$[^$\n]+?(?<!\s)\$(?!\d)"),
    "\\(": re.compile(r"\\\(.+?\\\)", re.S),
    "\\[": re.compile(r"\\\[.+?\\\]", re.S),
}
_GENERATED = re.compile(
    r"^[ \t]*\[(?:TOC|\[_TOC_\])\][ \t]*$|\{%(?:(?!\{%)[^\n])*?%\}", re.I | re.M
)
_ATTRIBUTES = re.compile(r"^( {0,3}#{1,6}[^\n]*?)[ \t]*\{[#.:][^{}\n]*\}[ \t]*$", re.M)
_POWER = re.compile(r"<(sup|sub)>([^<>\n]*)</\1>", re.I)
_TAG = re.compile(rf"</?(?:{'|'.join(_TAGS)})(?=[\s/>])[^<>]*>", re.I)
_AUTOLINK = re.compile(r"<((?:https?|mailto|ftp):[^<>\s]+)>")


def clean_markdown(text: str) -> tuple[str | None, str]:
    """(title of the front matter, the text without what is not text)."""
    text = text.replace("\x00", "")  # it marks what is put aside
    title = None
    front = _FRONT.match(text)
    if front and ":" in front.group(2) + front.group(1).replace("+", ":"):
        title = _front_title(front)
        text = text[front.end() :]
    text = "".join(part if code else _QUOTE.sub("", part) for code, part in _parts(text))
    known = {found.group(1).lower() for found in _DEFINITION.finditer(text)}
    cleaned = "".join(part if code else _clean(part, known) for code, part in _parts(text))
    cleaned = re.sub(r"\n[ \t]*\n(?:[ \t]*\n)+", "\n\n", cleaned)
    return title, _CONTENTS_HEADING.sub("", cleaned)


def _front_title(front: re.Match[str]) -> str | None:
    if front.group(1) == "+++":
        found = _TOML_TITLE.search(front.group(2))
        return found.group(1) if found else None
    try:
        # Every value as the text that stands there: 1.10 is no number, and 2026-02-30 no error.
        said = yaml.load(front.group(2), yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        return None
    title = said.get("title") if isinstance(said, dict) else None
    if not isinstance(title, str) or title.strip() in _NOTHING:
        return None
    return title.strip()


def _parts(text: str) -> Iterator[tuple[bool, str]]:
    """(is it code, a part of the text) in order; together they are the text."""
    at = 0
    for block in marked_blocks(text, "markdown"):
        if block.code:
            yield False, text[at : block.start]
            yield True, text[block.start : block.end]
            at = block.end
    yield False, text[at:]


def _clean(text: str, known: Set[str]) -> str:
    """Prose without markup; `known` are the labels of addresses that are defined somewhere."""
    spans: list[str] = []

    def put_back(said: str) -> str:
        return re.sub(r"\x00(\d+)\x00", lambda match: spans[int(match.group(1))], said)

    def put_aside(match: re.Match[str]) -> str:
        spans.append(put_back(match.group()))  # code may stand in a formula
        return f"\x00{len(spans) - 1}\x00"

    text = _CODE_SPAN.sub(put_aside, text)
    text = _without_math(text, put_aside)
    for pattern, end in (_COMMENT, *_UNSEEN):
        text = _without_closed(text, pattern, end)
    text = _GENERATED.sub("", text)
    text = _ATTRIBUTES.sub(r"\1", text)
    text = _CONTENTS.sub("", text)
    text = _DEFINITION.sub("", text)

    def said(match: re.Match[str]) -> str:
        label = match.group("label")
        if label is not None and (label or match.group("said")).lower() not in known:
            return match.group()  # no link, but an index: a[1][2]
        return match.group("said") if not match.group().startswith("!") else ""

    text = _IMAGE.sub(said, text)
    text = _LINK.sub(said, text)
    text = _AUTOLINK.sub(r"\1", text)
    text = _FRACTION.sub(lambda m: f"{m[1]}{' ' * bool(m[1])}{m[2]}/{m[3]}", text)
    text = _POWER.sub(lambda m: power(m[1].lower(), m[2].strip()), text)
    text = _TAG.sub("", text)
    return put_back(text)


# Many beginnings without an end would each be looked for to the end of the text.


def _without_closed(text: str, pattern: re.Pattern[str], end: re.Pattern[str]) -> str:
    """Without what has a beginning and an end; behind the last end nothing is looked for."""
    last = 0
    for found in end.finditer(text):
        last = found.end()
    return pattern.sub("", text[:last]) + text[last:]


def _without_math(text: str, put_aside: Callable[[re.Match[str]], str]) -> str:
    """With a sign for each formula."""
    parts: list[str] = []
    at, without_end = 0, set()
    for begins in _MATH_BEGINS.finditer(text):
        kind = begins.group()
        if begins.start() < at or kind in without_end:
            continue
        found = _MATH[kind].match(text, begins.start())
        if found is not None:
            parts += (text[at : found.start()], put_aside(found))
            at = found.end()
        elif kind != "$":  # that one ends with its line
            without_end.add(kind)
    return "".join([*parts, text[at:]])
