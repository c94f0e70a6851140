"""The lines of a PDF's page by pypdf, in which a raised number is told from the digits before it.

In a PDF 10 to the power of 5 is a 10 and a smaller 5 behind it, and as text both are 105. So a
number that is set smaller, directly behind a digit, gets a sign: `^`, or `_` where the page says
that it is lowered. Behind a letter (`m2`, `H2O`) it gets one only where the page says by how much
it is raised; without it the text is as readers are used to it.

Formulas with more in them than that are not read: their text is what the font says.
"""

from __future__ import annotations

import re
from typing import Any

from pypdf import PageObject

from cartridge_distill.data.documents.pdf_lines import Line, is_of_one_width

_NUMBER = re.compile(r"[+\-\u2212\u2013]?\d{1,4}(?=\D|$)")
_SMALLER = 0.85  # of the size before
_MOVED = 0.1  # of the size before, up or down


def page_lines(page: PageObject) -> list[Line]:
    """The lines of a page with their fonts, powers and indices marked."""
    lines = [Line()]
    before = ("", 0.0, 0.0)  # the last text that is no white space: itself, its size, its height

    def visit(text: str, cm: list[float], tm: list[float], font: Any, size: float) -> None:
        nonlocal before
        size *= abs(tm[3] or 1.0) * abs(cm[3] or 1.0)
        height = tm[5] * (cm[3] or 1.0) + cm[5]
        one_width = is_of_one_width(font)
        for number, part in enumerate((_sign(text, size, height, before) + text).split("\n")):
            if number:
                lines.append(Line())
            lines[-1].add(part, round(size, 1), one_width)
        if text:
            before = (text, size, height)

    page.extract_text(visitor_text=visit)
    return lines


def _sign(text: str, size: float, height: float, before: tuple[str, float, float]) -> str:
    said, size_before, height_before = before
    if not said or not _NUMBER.match(text) or size >= _SMALLER * size_before:
        return ""
    moved = (height - height_before) / size_before
    if abs(moved) > 1:  # another line
        return ""
    if abs(moved) > _MOVED and (said[-1].isalnum() or said[-1] in ")]"):
        return "^" if moved > 0 else "_"
    return "^" if said[-1].isdigit() else ""
