"""A file of the data as veRL's settings name it: its reader takes ``*``, ``?``, ``[`` for patterns.

A folder called ``guide [1]`` would not be found, and ``a?b`` would be read with all that look like
it. So a path is escaped where it becomes a setting, and read back where a setting becomes a path.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path

_ESCAPED = re.compile(r"\[([*?[])\]")


def named(file: Path) -> str:
    """The file as ``data.train_files`` names it."""
    return glob.escape(str(file))


def path_of(name: str) -> Path:
    """The file that a setting names."""
    return Path(_ESCAPED.sub(r"\1", name)).expanduser()


def problem(key: str, name: str) -> str | None:
    """Why veRL would not read the file that a setting means; None where it would."""
    if "::" in name:
        return (
            f"{key}={name!r}: veRL's reader takes '::' for a chain of places; fix: rename the "
            "folder"
        )
    if glob.has_magic(_ESCAPED.sub("", name)):
        return (
            f"{key}={name!r}: veRL's reader takes *, ? and [ for patterns, and reads every file "
            f"that fits; fix: name one file, {named(Path(name))!r} for this very name"
        )
    return None
