"""JSON objects that tell whether they are as they were written: one entry is a hash of the others.

A disk, a copy or a network that changes one bit of a number leaves a number. What such a number
decides (which step a cartridge is of, what a question scored) would be wrong, and nobody told. The
entry :data:`ENTRIES` finds that. It is no signature: whoever changes the others can change it too.

Files of earlier versions have no such entry. They are read; their reader says so where it matters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

ENTRIES = "entries_sha256"


class BrokenSeal(ValueError):
    """The entries are not those that were written. The message goes on where the file was named."""


def sealed(described: Mapping[str, Any]) -> dict[str, Any]:
    """An object's entries with the hash of all of them.

    Returns:
        Them as they are when they have been written and read, so that the hash is of these.
    """
    entries: dict[str, Any] = json.loads(json.dumps(dict(described), default=str))
    entries.pop(ENTRIES, None)
    return {**entries, ENTRIES: _sha256(entries)}


def is_sealed(described: Mapping[str, Any]) -> bool:
    return ENTRIES in described


def unsealed(described: Mapping[str, Any]) -> dict[str, Any]:
    """An object's own entries, compared with the hash among them where there is one.

    Raises:
        BrokenSeal: they are others.
    """
    entries = {name: value for name, value in described.items() if name != ENTRIES}
    if is_sealed(described) and (found := _sha256(entries)) != described[ENTRIES]:
        raise BrokenSeal(
            f"its entries are not those that were written: their SHA-256 is {found}, and it says "
            f"{ENTRIES}={described[ENTRIES]!r:.80}"
        )
    return entries


def _sha256(entries: Mapping[str, Any]) -> str:
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
