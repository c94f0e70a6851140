"""The end tags that an HTML page leaves out, put in as the HTML standard implies them.

`<li>One<li>Two` are two items. A parser that does not know this puts the second into the first,
a page of definitions becomes a thousand levels deep, and a table one cell. Taken out here: anchors
that lead nowhere (`<a name="x">`), which old pages do not close either.

The source comes out as it was but for that. Not done here: what else browsers repair.
"""

from __future__ import annotations

from html import escape
from html.parser import HTMLParser

_VOID = frozenset(
    ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source")
    + ("track", "wbr")
)
_ENDS_PARAGRAPH = frozenset(
    ("address", "article", "aside", "blockquote", "center", "details", "dir", "div", "dl", "dd")
    + ("dt", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5")
    + ("h6", "header", "hr", "li", "main", "menu", "nav", "ol", "p", "pre", "section", "table")
    + ("ul",)
)
_HEADINGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6"))
_ROWS = ("tr", "thead", "tbody", "tfoot", "caption", "colgroup")
_CELLS = ("td", "th")
# start tag -> (what it ends, what it does not look behind)
_ENDS: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "li": (("li",), frozenset(("ul", "ol", "menu", "dir", "table"))),
    "dt": (("dt", "dd"), frozenset(("dl", "table"))),
    "dd": (("dt", "dd"), frozenset(("dl", "table"))),
    "option": (("option",), frozenset(("select", "datalist"))),
    "td": (_CELLS, frozenset(("tr", "table"))),
    "th": (_CELLS, frozenset(("tr", "table"))),
    "tr": (("tr", "caption", "colgroup"), frozenset(("table", "thead", "tbody", "tfoot"))),
    **{name: (_ROWS, frozenset(("table",))) for name in ("thead", "tbody", "tfoot")},
}
# What may stand in a head; anything else ends it.
_OF_A_HEAD = frozenset(
    ("base", "basefont", "bgsound", "link", "meta", "title", "noscript", "noframes", "style")
    + ("script", "template", "head", "html")
)
_DEEPEST = 2_000  # levels: many times what a reader of the page gets through
_PARAGRAPHS_END = frozenset(("table", "td", "th", "caption", "button", "object"))


def with_end_tags(html: str) -> str:
    """The same page with the end tags that may be left out.

    Raises:
        RecursionError: it nests its tags too deeply.
    """
    writer = _Writer()
    writer.feed(html)
    writer.close()
    return "".join(writer.parts)


class _Writer(HTMLParser):
    """Writes what it reads, and an end tag in front of each tag that implies one."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a" and not any(name == "href" for name, _ in attrs):
            return
        self._imply(tag)
        self.parts.append(self.get_starttag_text() or f"<{tag}>")
        if tag not in _VOID:
            self._open.append(tag)
            if len(self._open) > _DEEPEST:
                raise RecursionError(f"tags are nested more than {_DEEPEST} deep")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._imply(tag)
        self.parts.append(self.get_starttag_text() or f"<{tag}/>")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._open:
            return  # of what was not opened, or was ended before
        while self._open.pop() != tag:
            pass
        self.parts.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "head" and data.strip():
            self.handle_endtag("head")
        raw = bool(self._open) and self._open[-1] in ("script", "style")
        self.parts.append(data if raw else escape(data, quote=False))

    def handle_comment(self, data: str) -> None:
        pass

    def _imply(self, tag: str) -> None:
        if self._open and self._open[-1] == "head" and tag not in _OF_A_HEAD:
            self.handle_endtag("head")
        if tag in _ENDS_PARAGRAPH:
            self._end(("p",), _PARAGRAPHS_END)
        if tag in _HEADINGS and self._open and self._open[-1] in _HEADINGS:
            self.handle_endtag(self._open[-1])
        if tag in _ENDS:
            self._end(*_ENDS[tag])

    def _end(self, names: tuple[str, ...], behind: frozenset[str]) -> None:
        """Ends the innermost open tag of these names; none behind one of those others."""
        for name in reversed(self._open):
            if name in names:
                self.handle_endtag(name)
                return
            if name in behind:
                return
