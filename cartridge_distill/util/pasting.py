"""Text that a person pastes: a setting of veRL's is read by the shell first and by Hydra then.

A folder may be called ``Bücher [1], #2``. What is printed for pasting must give that very name in
the end, so it is quoted for every reader on its way.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

# What Hydra's grammar takes for a text without quotes: it has no umlauts, commas or brackets.
_PLAIN = re.compile(r"[A-Za-z0-9_./:@+-]+")
# What it would take for something else than a text.
_NO_TEXT = re.compile(
    r"null|true|false|nan|[+-]?inf|[+-]?[0-9][0-9_]*|[+-]?[0-9_.]+(e[+-]?[0-9_]+)?", re.IGNORECASE
)
_BEFORE_QUOTE = re.compile(r"(\\+)(?='|\Z)")


def hydra_value(value: object) -> str:
    """A value in Hydra's grammar; a text or a path stays a text whatever it looks like."""
    if value is None:
        return "null"
    if not isinstance(value, str | Path):
        return str(value)
    text = str(value)
    if _PLAIN.fullmatch(text) and not _NO_TEXT.fullmatch(text):
        return text
    return _quoted(text)


def _quoted(text: str) -> str:
    # A backslash stands for itself, except before a quote; OmegaConf would resolve "${...}".
    text = _BEFORE_QUOTE.sub(r"\1\1", text.replace("${", r"\${")).replace("'", r"\'")
    return f"'{text}'"


def pasted_setting(key: str, value: object) -> str:
    """``key=value`` for a shell's command line that ends in Hydra; a text is always quoted."""
    shown = _quoted(str(value)) if isinstance(value, str | Path) else hydra_value(value)
    return shell_quoted(f"{key}={shown}")


def shell_quoted(text: str) -> str:
    """One word of a shell's command line, in double quotes where they are enough to read well."""
    if "'" in text and not set(text) & set('"$`\\!'):
        return f'"{text}"'
    return shlex.quote(text)
