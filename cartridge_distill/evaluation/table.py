"""The results as text: a Markdown table for a terminal, and the sentence below it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cartridge_distill.evaluation.measures import BANDS

# metric -> (its column, digits after the point); a table for each mapping that has anything to show
_COLUMNS = {
    "kl": ("KL to full document", 3),
    "prompt_kl": ("KL on held-out prompts", 3),
    "log_loss": ("log-loss of answer", 2),
    "accuracy": ("accuracy", 2),
    "generated_accuracy": ("generated accuracy", 2),
}
_MEASURES = {
    "student_kl": ("KL on own text", 3),
    "student_reverse_kl": ("reverse KL on own text", 3),
    "topk_overlap": ("top-20 overlap", 3),
    "generated_match": ("right in free answer", 2),
    "repetition": ("repeated 4-grams", 2),
    "ended": ("ended", 2),
    "answer_tokens": ("tokens", 0),
    "off_context_kl": ("KL to bare model, off context", 3),
}
_BANDS = {
    f"{name}_{first}_{last}": (f"{title}, {first}-{last}", 3)
    for name, title in (("student_kl", "KL"), ("student_reverse_kl", "reverse KL"))
    for first, last in BANDS
}


def format_table(summary: Mapping[str, Any]) -> str:
    """The conditions of ``evaluation.json``, a line each: score and interval.

    The scores of ``--measures`` stand in tables of their own, and so do the bands of position.
    """
    conditions = summary["conditions"]
    tables = []
    for columns in (_COLUMNS, _MEASURES, _BANDS):
        shown = [name for name in columns if any(c["metrics"].get(name) for c in conditions)]
        if shown:
            tables.append(_table(conditions, columns, shown, columns is _COLUMNS))
    said = [
        difference
        for columns in (_COLUMNS, _MEASURES)
        for difference in _differences(summary, columns)
    ]
    level = f"[low, high]: {summary['confidence']:.0%} interval, bootstrap over questions"
    return "\n".join(["\n\n".join(tables), "", level, *said])


def _table(
    conditions: Sequence[Mapping[str, Any]],
    columns: Mapping[str, tuple[str, int]],
    shown: Sequence[str],
    with_tokens: bool,
) -> str:
    header = ["condition", *(columns[name][0] for name in shown)]
    body = [
        [
            condition["condition"],
            *(_with_interval(condition["metrics"].get(name), columns[name][1]) for name in shown),
            *([str(condition["kv_tokens"])] if with_tokens else []),
        ]
        for condition in conditions
    ]
    return _aligned([*header, *(["KV tokens"] if with_tokens else [])], body)


def _with_interval(metric: Mapping[str, float] | None, digits: int, sign: str = "") -> str:
    if metric is None:
        return ""
    mean, low, high = (f"{metric[key]:{sign}.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _differences(
    summary: Mapping[str, Any], columns: Mapping[str, tuple[str, int]]
) -> Iterator[str]:
    for pair in summary["differences"]:
        parts = [
            f"{title} {_with_interval(found, digits, '+')}"
            for name, (title, digits) in columns.items()
            if (found := pair["metrics"].get(name)) is not None
        ]
        if parts:
            yield f"{pair['condition']} - {pair['baseline']}: {', '.join(parts)}"


def _aligned(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]

    def line(cells: Sequence[str]) -> str:
        numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([cells[0].ljust(widths[0]), *numbers]) + " |"

    rules = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), f"|{'|'.join(rules)}|", *map(line, body)])
