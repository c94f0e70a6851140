"""JSON that people and other programs write: any Unicode encoding, and no name twice.

Python's ``json`` refuses a byte order mark in a text, and keeps the last of two entries of a name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cartridge_distill.util.lfs import IS_ONE, pointer_in

_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class JsonError(ValueError):
    """No JSON, or a name twice in one object. The message goes on where the file was named."""


def decode(data: bytes) -> str:
    """The text of a JSON file: UTF-8, -16 or -32, with a byte order mark or without.

    Raises:
        JsonError: it is none of these.
    """
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        raise JsonError(f"is no Unicode text ({error}); save it as UTF-8") from error


def loads(text: str, file_names: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        file_names: it may hold names of files that are no text, as Python has them: a lone
            surrogate for each byte that is none.

    Raises:
        JsonError: it is none, an object has one name twice, or a text is none.
    """
    try:
        found = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=no_name_twice)
        if _HALF.search(text):  # of a pair, mostly
            errors = "surrogateescape" if file_names else "strict"
            json.dumps(found, ensure_ascii=False).encode(errors=errors)
    except JsonError:
        raise
    except UnicodeEncodeError as error:
        raise JsonError(
            f"holds half a character ({error.object[error.start]!r}, a lone surrogate), which is "
            "no text; write it anew"
        ) from error
    except (ValueError, RecursionError) as error:
        raise JsonError(f"is not JSON: {error}") from error
    return found


def load(path: Path, file_names: bool = False) -> Any:
    """The value of a JSON file.

    Args:
        file_names: as :func:`loads` has it.

    Raises:
        JsonError: as :func:`loads`, or a Git LFS pointer lies there.
        OSError: it cannot be read.
    """
    if pointer_in(path) is not None:
        raise JsonError(IS_ONE)
    return loads(decode(path.read_bytes()), file_names)


def no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json``'s ``object_pairs_hook``. Raises :class:`JsonError`."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise JsonError(f"has a name twice: {name!r} occurs twice in one object; keep one")
        found[name] = value
    return found
