"""What a page shows by position, written out, so that numbers and formulas keep their meaning.

A power or an index loses its place when tags become text: 10<sup>5</sup> must not become 105, and
<mfrac> with 1 and 2 not 12. They are written as `10^5`, `x_1`, `(1)/(2)`; a formula that carries
its TeX is given as TeX, between dollar signs.
"""

from __future__ import annotations

import re

from bs4 import BeautifulSoup, Tag
from bs4.element import NavigableString

_ORDINALS = frozenset("st nd rd th er re e ème eme o a os as te ter de".split())  # 1st, 2e, 3º
_TRADE = frozenset(("tm", "sm", "®", "©", "™"))
_STROKES = ("/", "\u2044")
_SIMPLE = re.compile(r"[+\-−–]?\w+(?:[.,]\d+)?$")
_NOTE = re.compile(r"\W*(?:\d{1,3}|[a-z]|note \d+|citation needed|\W)\W*$", re.I)
_FORMULA = re.compile(r"\\[a-zA-Z]+|[\^_]\{|\w\^\w")


def plain_formulas(soup: BeautifulSoup) -> None:
    """MathML, MathJax' scripts and images of formulas become text."""
    for tag in soup.find_all("script", type=re.compile(r"^math/tex")):
        tag.replace_with(NavigableString(f"${tag.get_text().strip()}$"))
    for tag in soup.find_all(class_="katex-html"):
        tag.decompose()
    for tag in soup.find_all("math"):
        if tag.decomposed:
            continue
        tex = _tex(tag)
        tag.replace_with(NavigableString(f"${tex}$" if tex else _linear(tag)))
    for image in soup.find_all("img"):
        said = str(image.get("alt") or "").strip()
        if "math" in str(image.get("class", "")) and said or _FORMULA.search(said):
            image.replace_with(NavigableString(f"${said}$"))


def plain_powers(soup: BeautifulSoup) -> None:
    """`sup` and `sub` become `^` and `_`, a pair of them with a stroke a fraction; notes go."""
    for over in soup.find_all("sup"):
        stroke = over.next_sibling
        under = stroke.next_sibling if stroke is not None else None
        if stroke is None or not isinstance(under, Tag):
            continue
        if under.name == "sub" and str(stroke).strip() in _STROKES:
            whole = over.previous_sibling
            space = " " if whole is not None and str(whole)[-1:].isdigit() else ""
            over.replace_with(NavigableString(f"{space}{over.get_text()}/{under.get_text()}"))
            stroke.extract()
            under.decompose()
    for tag in soup.find_all(["sup", "sub"]):
        if tag.decomposed:
            continue
        said = tag.get_text().strip()
        link = tag.find("a")
        to_note = isinstance(link, Tag) and str(link.get("href", "")).startswith("#")
        if not said or to_note and _NOTE.match(said):
            tag.decompose()
        else:
            tag.replace_with(NavigableString(power(tag.name, said)))


def power(name: str, said: str) -> str:
    """What `said` is written as in the tag of this name, `sup` or `sub`."""
    if name == "sup" and said.lower() in _ORDINALS | _TRADE:
        return said
    return ("^" if name == "sup" else "_") + _grouped(said)


def _grouped(said: str) -> str:
    return said if _SIMPLE.match(said) else f"({said})"


def _tex(math: Tag) -> str:
    note = math.find("annotation", encoding=re.compile("tex", re.I))
    said = note.get_text() if isinstance(note, Tag) else str(math.get("alttext") or "")
    return " ".join(said.split())


def _linear(node: Tag | NavigableString) -> str:
    """MathML on one line."""
    if not isinstance(node, Tag):
        return str(node).strip()
    parts = [_linear(child) for child in node.children if isinstance(child, (Tag, NavigableString))]
    parts = [part for part in parts if part]
    match node.name, parts:
        case (("annotation" | "annotation-xml"), _):
            return ""
        case "mfrac", [over, under]:
            return f"({over})/({under})"
        case (("msup" | "mover"), [base, power]):
            return f"{base}^{_grouped(power)}"
        case (("msub" | "munder"), [base, index]):
            return f"{base}_{_grouped(index)}"
        case (("msubsup" | "munderover"), [base, index, power]):
            return f"{base}_{_grouped(index)}^{_grouped(power)}"
        case "msqrt", _:
            return f"sqrt({''.join(parts)})"
        case "mroot", [base, index]:
            return f"root_{_grouped(index)}({base})"
        case "mtr", _:
            return "[" + ", ".join(parts) + "]"
        case "mo", [sign] if sign not in ("(", ")", "[", "]", ",", "\u2062", "\u2061"):
            return f" {sign} " if sign in ("=", "<", ">", "≤", "≥", "+", "−", "-", "→") else sign
    return "".join(part for part in parts if part not in ("\u2061", "\u2062", "\u2063"))
