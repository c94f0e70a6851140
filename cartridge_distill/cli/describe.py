"""What ``cartridge-distill info`` shows of a cartridge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import markup
from rich.table import Table

from cartridge_distill.cartridge.formats.stored_cartridge import StoredCartridge
from cartridge_distill.cartridge.model_card import curve_in_a_line
from cartridge_distill.util.shown_text import printable


def described(stored: StoredCartridge) -> list[Table]:
    """What is known, a line each, with dotted names for what is inside; then the results."""
    rows: dict[str, Any] = {**stored.shape(), "dtype": stored.dtype_name()}
    rows["bytes"] = f"{stored.snapshot.num_bytes:,}"
    rows["sha256"] = stored.sha256 or "none in the file: a changed bit would not be seen"
    metrics = dict(stored.meta.metrics)
    results = [row for row in metrics.pop("results", None) or [] if isinstance(row, Mapping)]
    for name, value in (stored.meta.as_dict() | {"metrics": metrics}).items():
        rows |= _flat(name, value)
    facts = Table(show_header=False, box=None)
    for name, value in rows.items():
        facts.add_row(escape(name), escape(str(value)))
    return [facts, *([_results(results)] if results else [])]


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Leaves out what is not known; a curve is one line."""
    if name == "metrics.curve":
        value = curve_in_a_line(value)
    if isinstance(value, Mapping):
        flat: dict[str, Any] = {}
        for key, inner in value.items():
            flat |= _flat(f"{name}.{key}", inner)
        return flat
    return {} if value in (None, "", []) else {name: value}


def _results(results: list[Mapping[str, Any]]) -> Table:
    names = list(results[0])
    table = Table(*(escape(name.replace("_", " ")) for name in names))
    for row in results:
        values = (row.get(name, "") for name in names)
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else escape(str(v)) for v in values))
    return table


def escape(text: str) -> str:
    """What a file says, for rich: neither its markup nor a terminal's."""
    return markup.escape(printable(text))
