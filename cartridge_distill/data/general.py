"""General rows: prompts that have nothing to do with any document, by an explicit label.

A cartridge stands before every prompt, also before one that its document has nothing to say about,
and changes the answer there more than the document itself would. General rows teach it not to:
their teacher is the bare model, with what it always begins with and no document.

A row is general when its ``extra_info`` says ``kind: general`` *and* names no document. Any other
row without a document is an error: a teacher without its document would train the cartridge to
know nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from cartridge_distill.util.errors import DocumentError

GENERAL = "general"
"""The kind of such a row, and the name of its recipe."""

BARE: Final = None
"""In place of a document's id: no document, by intent."""


def is_general(info: Mapping[str, Any] | None) -> bool:
    """Is a row with this ``extra_info`` labelled as general?"""
    return (info or {}).get("kind") == GENERAL


def document_of(info: Mapping[str, Any] | None, key: str, where: str) -> str | None:
    """The document that a row's teacher reads; :data:`BARE` for a general row.

    Args:
        info: the row's ``extra_info``.
        key: of the document's id in it.
        where: names the row, for messages.

    Raises:
        DocumentError: no document and no label, or both.
    """
    value = (info or {}).get(key)
    if is_general(info):
        if value is not None:
            raise DocumentError(
                f"{where} is labelled {GENERAL!r} and names the document {value!r}: its teacher "
                f"would be the bare model; fix: take the document out, or give it another kind"
            )
        return BARE
    if value is None:
        raise DocumentError(
            f"{where} (extra_info {info!r}) has no {key!r}; without its document the teacher would "
            "be the bare model; fix: prepare the data with `cartridge-distill prepare`, or set "
            "actor_rollout_ref.actor.cartridge.document_key. A row that is to have no document "
            f"says so: kind {GENERAL!r}"
        )
    return str(value)
