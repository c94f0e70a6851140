"""JSON from strangers: one meaning or none.

Python's reader takes more than JSON is: ``NaN``, ``Infinity``, numbers that overflow to infinity,
half characters (lone surrogates) that no answer can be written with, and a name that stands twice
in one object, of which every reader picks another. All of these are refused here, and so is what is
nested, or has as many names, as no request of ours has: whoever walks over it later need not care.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

MAX_DEPTH = 32
"""Lists and objects within each other."""
MAX_NAMES = 1024
"""Names of one object."""
MAX_PARTS = 2**16
"""Lists, objects and names in all, and the names of one object where a caller allows more."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SHOWN = 80


class BadJson(ValueError):
    """The text is no JSON that is read here; the message shows little of it."""


def loads(text: bytes | bytearray, max_names: int = MAX_NAMES) -> Any:
    """Reads UTF-8.

    Args:
        max_names: that one object may have.

    Raises:
        BadJson: with the reason, in at most some 200 characters.
    """

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found) > max_names:
            raise BadJson(f"an object has {len(found)} names; at most {max_names} are read")
        made = dict(found)
        if len(made) != len(found):
            names = [name for name, _ in found]
            twice = next(name for name in names if names.count(name) > 1)
            raise BadJson(f"the name {twice[:_SHOWN]!a} stands twice in one object; name it once")
        return made

    try:
        decoded = text.decode("utf-8")
        if sum(map(decoded.count, "[{:")) > MAX_DEPTH:
            _check_parts(decoded)
        value = json.loads(
            decoded, object_pairs_hook=pairs, parse_constant=_constant, parse_float=_number
        )
        if _SURROGATE.search(decoded):
            for string in _strings(value):
                string.encode("utf-8")
    except BadJson:
        raise
    except UnicodeDecodeError as error:
        raise BadJson(f"byte {error.start} is no UTF-8") from error
    except UnicodeEncodeError as error:
        raise BadJson("a string has half a character (a lone surrogate)") from error
    except json.JSONDecodeError as error:
        raise BadJson(f"{error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise BadJson(f"it is nested too deep; {MAX_DEPTH} levels are read") from error
    except ValueError as error:  # an integer of thousands of digits
        raise BadJson("a number has too many digits") from error
    return value


def _constant(name: str) -> NoReturn:
    raise BadJson(f"{name} is no JSON number")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadJson(f"the number {text[:_SHOWN]} is too large")
    return value


_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}:]', re.DOTALL)


def _check_parts(text: str) -> None:
    """Before the reader, which makes all of it and follows every level with one of its own."""
    depth = parts = 0
    for found in _MARKS.finditer(text):
        mark = found.group()[0]
        if mark in "]}":
            depth -= 1
        elif mark != '"':
            parts += 1
            depth += mark != ":"
            if depth > MAX_DEPTH:
                raise BadJson(f"it is nested too deep; {MAX_DEPTH} levels are read")
            if parts > MAX_PARTS:
                raise BadJson(f"it has more than {MAX_PARTS} lists, objects and names")


def _strings(value: Any) -> Iterator[str]:
    """Every string in a value that was read, names too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
