"""An HTML page to Markdown: what one would read of it, and how much of what is visible that is.

What nobody sees goes first: scripts, styles, controls of forms, hidden elements; and so do the
marks that a generator puts behind headings. The rest is the *visible text*. Of it, navigation is
taken out (`nav` and its roles, lists of links, contents), and the page's `main` or `article` is
taken alone if it holds most of what is left. When less than half of the visible text that is no
link would be kept, those rules do not fit the page: then all of the visible text is.

What a number or a formula means is kept: `page_marks` writes powers, indices and fractions out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bs4 import BeautifulSoup, Tag
from bs4.dammit import EncodingDetector
from bs4.element import NavigableString
from markdownify import MarkdownConverter

from cartridge_distill.data.documents.decoding import decode
from cartridge_distill.data.documents.page_code import lines_of_code, prose_out_of_code
from cartridge_distill.data.documents.page_marks import plain_formulas, plain_powers
from cartridge_distill.data.documents.page_tags import with_end_tags
from cartridge_distill.util.errors import DocumentError

_UNSEEN = (
    *("head", "title", "script", "style", "template", "noscript", "svg", "iframe", "object"),
    *("canvas", "audio", "video", "map", "input", "button", "select", "textarea", "datalist"),
    "dialog",
)
_HIDING_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.I)
_HIDING_CLASSES = frozenset(
    ("sr-only", "visually-hidden", "visuallyhidden", "screen-reader-text", "d-none", "hidden")
)
_ROLES = ("navigation", "search", "banner", "contentinfo", "menu", "menubar", "toolbar")
_NAVIGATION = re.compile(
    r"^(?:nav|navbar|navigation|navheader|navfooter|nav-?panel|breadcrumbs?|toc|contents"
    r"|table-?of-?contents|list-of-(?:figures|tables|examples)|sphinxsidebar|sidebar|related"
    r"|toplang|bottomlang|menu|footer|site-?header|site-?footer|mw-jump-link|printfooter|catlinks|skip-?links?)$",
    re.I,
)
_HEADING_MARK = re.compile(r"^[\s¶#§¤🔗\u200b\uf0c1]*$")
_MARKED = re.compile(r"\A\s*(?:#{1,6}\s|```|~~~|\||(?:=+|-{2,})\s*$)")  # Markdown's, but not meant
_BLOCKS = ("p", "div", "ul", "ol", "dl", "table", "pre", "blockquote", "h1", "h2", "h3", "h4")
_LINKED = 0.8  # of a list's letters; more is navigation
_FEWEST_LINKS = 3
_MOST, _NEARLY_ALL, _HARDLY = 0.5, 0.995, 0.2
_LONG_CELL = 200  # characters; a table of data has shorter ones


@dataclass(frozen=True)
class Page:
    """A page's own title, its text in Markdown, and what a user should know about it."""

    title: str | None
    text: str
    notes: tuple[str, ...]


def read_page(data: bytes, name: str) -> Page:
    """The text of an HTML file.

    Raises:
        DocumentError: it holds no text, or nests its tags too deeply.
    """
    decoded = decode(data, name, EncodingDetector.find_declared_encoding(data, is_html=True))
    try:
        soup, title = _visible(decoded.text)
        visible, prose = _letters(soup.get_text()), _unlinked(soup)
        part = _without_navigation(soup)
        lost = _unlinked(part) < _MOST * prose
        text = _markdown(part)
        kept = _letters(text)
        notes = [decoded.note] if decoded.note else []
        if lost or kept < _HARDLY * visible:
            said = f"its main part is {_percent(kept, visible)} of the visible text"
            notes.append(f"{said}: all of it was taken")
            soup, _ = _visible(decoded.text)
            text = _markdown(soup.body or soup)
        elif kept < _NEARLY_ALL * visible:
            notes.append(f"{_percent(kept, visible)} of the visible text kept")
    except RecursionError as error:
        raise DocumentError(
            f"{name} nests its tags too deeply to be read; fix: save the page as text"
        ) from error
    if not text.strip():
        raise DocumentError(
            f"{name} is a page without text; fix: if a script fills it, save it from a browser "
            "once it is shown, or as PDF"
        )
    return Page(title, text, tuple(notes))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %"


def _letters(text: str) -> int:
    return sum(char.isalnum() for char in text)


def _unlinked(tag: Tag) -> int:
    """Letters that are no link's: contents and menus may be longer than what they stand beside."""
    links = [link for link in tag.find_all("a") if link.get("href")]
    return _letters(tag.get_text()) - sum(_letters(link.get_text()) for link in links)


def _visible(html: str) -> tuple[BeautifulSoup, str | None]:
    """What a reader sees, with formulas written out; and the title."""
    soup = BeautifulSoup(with_end_tags(html), "html.parser")
    title = _title(soup)
    plain_formulas(soup)
    for tag in soup.find_all(_UNSEEN):
        tag.decompose()
    for tag in soup.find_all(_is_hidden):
        if not tag.decomposed:
            tag.decompose()
    for tag in soup.find_all("a"):
        classes = " ".join(_classes(tag))
        if "headerlink" in classes or tag.get("href") and _HEADING_MARK.match(tag.get_text()):
            if tag.find("img") is None:
                tag.decompose()
    for tag in soup.find_all(class_="mw-editsection"):
        tag.decompose()
    plain_powers(soup)
    return soup, title


def _title(soup: BeautifulSoup) -> str | None:
    for heading in (soup.title, soup.h1):
        said = " ".join(heading.get_text().split()).rstrip("¶ ") if heading else ""
        if said:
            return said
    return None


def _classes(tag: Tag) -> list[str]:
    said = tag.get("class")
    return said.split() if isinstance(said, str) else list(said or ())


def _is_hidden(tag: Tag) -> bool:
    if tag.has_attr("hidden") or tag.get("aria-hidden") == "true":
        return True
    if not _HIDING_CLASSES.isdisjoint(_classes(tag)):
        return True
    return bool(_HIDING_STYLE.search(str(tag.get("style", ""))))


def _without_navigation(soup: BeautifulSoup) -> Tag:
    """The page's body, or the part of it that holds most of its text; changes the page."""
    body = soup.body or soup
    prose = _unlinked(body)
    for tag in body.find_all(_is_navigation):
        if not tag.decomposed and _unlinked(tag) < _MOST * prose:
            tag.decompose()
    for tag in body.find_all(["ul", "ol", "dl", "table"]):
        if not tag.decomposed and _is_of_links(tag) and _unlinked(tag) < _MOST * prose:
            tag.decompose()
    for tag in body.find_all(["p", "div"]):
        if not tag.decomposed and tag.find(_BLOCKS) is None and _is_of_links(tag):
            tag.decompose()
    left = _unlinked(body)
    for found in (body.find_all("main"), body.find_all(role="main"), body.find_all("article")):
        if len(found) == 1 and _unlinked(found[0]) >= _MOST * left:
            return found[0]
    for tag in body.find_all(["footer", "aside"]):
        if not tag.decomposed and tag.find_parent("article") is None:
            tag.decompose()
    return body


def _is_navigation(tag: Tag) -> bool:
    if tag.name == "nav" or tag.get("role") in _ROLES:
        return True
    if tag.name in ("body", "html", "main", "article", "h1", "h2", "h3", "h4", "h5", "h6"):
        return False
    names = [*_classes(tag), str(tag.get("id") or "")]
    return any(_NAVIGATION.match(name) for name in names)


def _is_of_links(tag: Tag) -> bool:
    """Is nearly all of it links to other pages or places?"""
    links = [link for link in tag.find_all("a") if link.get("href")]
    if len(links) < _FEWEST_LINKS:
        return False
    linked = sum(_letters(link.get_text()) for link in links)
    return linked >= _LINKED * _letters(tag.get_text())


def _markdown(page: Tag) -> str:
    for table in page.find_all("table"):
        if _is_layout(table):
            _flatten(table)
    for quote in page.find_all("blockquote"):
        quote.name = "div"  # indented, for most pages; its mark would stand in every line
    lines_of_code(page)
    prose_out_of_code(page)
    for string in page.find_all(string=_MARKED):
        if _begins_a_line(string):
            stripped = str(string).lstrip()
            string.replace_with(NavigableString("\\" + stripped))
    converter = MarkdownConverter(
        heading_style="ATX",
        strip=["a", "img"],  # the words of a link, not where it leads
        escape_asterisks=False,
        escape_underscores=False,
        escape_misc=False,
    )
    return str(converter.convert_soup(page)).replace("\u00ad", "")


def _is_layout(table: Tag) -> bool:
    """A table that only puts blocks beside each other."""
    if table.get("role") in ("presentation", "none") or table.find("table") is not None:
        return True
    rows = table.find_all("tr")
    cells = table.find_all(["td", "th"])
    filled = [sum(bool(c.get_text().strip()) for c in row.find_all(["td", "th"])) for row in rows]
    if len(cells) <= 1 or all(count <= 1 for count in filled):
        return True
    if table.find("th") is not None:
        return False
    return any(
        len(cell.get_text()) > _LONG_CELL and (cell.find(_BLOCKS) or len(rows) < _FEWEST_LINKS)
        for cell in cells
    )


def _flatten(table: Tag) -> None:
    inner = ("caption", "thead", "tbody", "tfoot", "tr", "td", "th")
    mine = [tag for tag in table.find_all(inner) if tag.find_parent("table") is table]
    for tag in [table, *mine]:
        tag.name = "div"
        tag.attrs = {}


def _begins_a_line(string: NavigableString) -> bool:
    if string.find_parent(["pre", "code"]) is not None or not isinstance(string.parent, Tag):
        return False
    before = string.previous_sibling
    if before is None:
        return string.parent.name not in ("a", "b", "i", "em", "strong", "span", "td", "th")
    return isinstance(before, Tag) and before.name in (*_BLOCKS, "br")
