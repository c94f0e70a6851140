"""What may be the id of a cartridge on the Hub. Imports nothing that takes time."""

from __future__ import annotations

import re

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def is_hub_id(name: str) -> bool:
    """``owner/name`` or ``owner/name@revision``; other paths begin with ``/``, ``.`` or ``~``."""
    return _HUB_ID.fullmatch(name) is not None
