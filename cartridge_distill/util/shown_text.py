"""Text of others on a terminal: a title, a name or an answer is shown and moves nothing.

A document may be called ``\\x1b[2J``, which clears a screen, and a model may write it. Whatever
comes from a file, a card or a model passes here on its way to a terminal; what is stored stays as
it is.
"""

from __future__ import annotations

import os
import re

# Control characters but for line ends and tabs, and what turns the direction of text around.
_MOVES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The same with control characters as escapes: ``\\x1b`` for the one that begins a sequence."""
    return _MOVES.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def name_as_text(name: str) -> str:
    """A file's name as text: a byte of it that is no UTF-8 is written as ``\\xff``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
