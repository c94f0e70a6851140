"""``Content-Digest``: the SHA-256 of an answer's body, in a header of it (RFC 9530).

A number that loses a bit on its way is another number, and JSON has nothing that would tell. Both
ends of this project send and compare the header; answers of other servers come without it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re

HEADER = "Content-Digest"
_SHA256 = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/=]*):\s*(?:$|,)")


def digest_of(body: bytes) -> str:
    """The header's value for a body."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def is_of(value: str | None, body: bytes) -> bool:
    """Whether a body is the one that a header's value was made of.

    Args:
        value: None where there is no header. Then nothing is known, and nothing is wrong; the same
            where it has no SHA-256.
    """
    found = _SHA256.search(value) if value is not None else None
    if found is None:
        return True
    try:
        return base64.b64decode(found[1], validate=True) == hashlib.sha256(body).digest()
    except binascii.Error:
        return False
