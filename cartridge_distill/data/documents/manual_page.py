"""A manual page that a terminal showed: its head and foot are no text, and its name is the title.

`man -P cat ls > ls.txt` begins with "LS(1)   User Commands   LS(1)" and ends with a line of the
same kind. groff divides words at a line's end with its own hyphen (U+2010), which nobody types.
"""

from __future__ import annotations

import re

_HEAD = re.compile(r"^\s*(?P<name>\S+\(\d\w{0,5}\))\s{2,}(?:\S.*\s{2,})?(?P=name)\s*$")
_LOOKED_AT = 5  # lines at the beginning that may be the head


def without_head(text: str) -> tuple[str | None, str]:
    """("ls(1)" or None where it is no manual page, the text without heads and feet)."""
    lines = text.split("\n")
    said = [line for line in lines[:_LOOKED_AT] if line.strip()]
    head = _HEAD.match(said[0]) if said else None
    if head is None:
        return None, text
    name = head.group("name")
    foot = re.compile(rf"^\s*\S.*\s{{2,}}{re.escape(name)}\s*$")
    kept = [line for line in lines if not _HEAD.match(line) and not foot.match(line)]
    return name.lower() if name.isupper() else name, "\n".join(kept).strip("\n")
