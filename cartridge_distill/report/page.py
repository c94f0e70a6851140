"""The page: what the runs say, filled into ``page.html`` and written as one file.

Nothing is fetched: plots, style and script are in the file. plotly.js is there compressed (2 MB
instead of 5), and the browser's own DecompressionStream unpacks it.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from cartridge_distill.evaluation.names import TRAINED
from cartridge_distill.report import (
    answers,
    colours,
    facts,
    figures,
    positions,
    shading,
    stages,
    verdict,
)
from cartridge_distill.report.comparison import at_equal_tokens, compare
from cartridge_distill.report.groups import Group, TokenAxis, group_runs, token_axis
from cartridge_distill.report.reading import (
    Condition,
    Interval,
    Position,
    Run,
    condition_order,
    read_run,
)
from cartridge_distill.util.errors import ReportError

# Columns of the table: metric, heading, unit or remark.
_BEGINNING_BYTES = 2**16  # the page's title is in them
_METRICS = (
    ("log_loss", "Log-loss of the right answer", "nats per token, lower is better"),
    ("kl", "KL to the full document", "nats per token, lower is better"),
    ("prompt_kl", "KL on held-out prompts", "nats per token, lower is better"),
    ("accuracy", "Accuracy", "multiple choice, by likelihood"),
    ("generated_accuracy", "Generated accuracy", "answers written out"),
)
_MEASURES = (
    ("student_kl", "KL on own text", "nats per token, lower is better"),
    ("student_reverse_kl", "Reverse KL on own text", "nats per token, lower is better"),
    ("topk_overlap", "Top-20 overlap", "with the teacher’s, on own text"),
    ("generated_match", "Right in free answer", "contains the right answer"),
    ("repetition", "Repeated 4-grams", "of own text, lower is better"),
    ("ended", "Ended", "texts that end by themselves"),
    ("off_context_kl", "KL off context", "to the bare model, nats per token"),
)


@dataclass(frozen=True)
class Row:
    """A row of the table of conditions."""

    name: str
    style: colours.Style
    kv_tokens: int
    metrics: dict[str, Interval | None]
    positions: list[Position]


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Reads the runs and writes the report.

    Args:
        folders: one run or several; seeds of one recipe are drawn as a mean with its band.
        out: the HTML file.

    Raises:
        ReportError: a run cannot be read, or is named twice.
    """
    if not folders:
        raise ReportError("no run is named; fix: name the folder of one at least")
    resolved = [folder.resolve() for folder in folders]
    twice = [str(folder) for folder in folders if resolved.count(folder.resolve()) > 1]
    if twice:
        raise ReportError(f"{twice[0]} is named twice; fix: name each run once")
    check_replaceable(out)
    text = render([read_run(folder) for folder in folders])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return out


def check_replaceable(out: Path) -> None:
    """Raises ReportError when ``out`` is something else than a report."""
    if out.is_dir():
        raise ReportError(f"{out} is a folder; fix: name the HTML file")
    if out.exists():
        with out.open("rb") as file:
            beginning = file.read(_BEGINNING_BYTES)
        if b": cartridge report</title>" not in beginning:
            raise ReportError(f"{out} is there and is no report; fix: name another file with --out")


def render(runs: Sequence[Run]) -> str:
    """The page's text."""
    groups = group_runs(runs)
    axis = token_axis(runs)
    comparison = compare(groups, axis) if len(groups) > 1 else None
    said = verdict.of_one(groups[0]) if len(groups) == 1 else verdict.of_several(comparison, axis)
    rows = condition_rows(groups)
    tables = [
        [each for each in metrics if any(row.metrics.get(each[0]) for row in rows)]
        for metrics in (_METRICS, _MEASURES)
    ]
    marks = [figures.Mark(row.name, row.style, row.metrics) for row in rows]
    pictures = [figures.conditions(marks, *each) for metrics in tables for each in metrics]
    lines = [positions.Line(row.name, row.style, row.positions) for row in rows]
    above = [each for each in pictures if each is not None] + positions.figures(lines)
    seconds = stages.stages(groups, axis)
    curves = figures.curves(groups, axis) + ([seconds] if seconds else [])
    curves += figures.health(groups, axis)
    columns, questions = answers.all_questions(groups)
    named = [(group.run_name(run), run) for group in groups for run in group.runs]
    script = _own("page.js")
    environment = Environment(
        loader=PackageLoader("cartridge_distill.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=_figure, percent=_percent, whole=_whole)
    return environment.get_template("page.html").render(
        names=[group.name for group in groups],
        verdict=said,
        tables=[metrics for metrics in tables if metrics],
        percents=figures.PERCENT,
        rows=rows,
        confidence=_confidence(runs),
        seeds=max(len(group.runs) for group in groups),
        conditions=above,
        standings=_standings(groups, axis),
        legend=[(group.name, colours.of_run(n)) for n, group in enumerate(groups)],
        curves=[figure for figure in curves if not figure.flat],
        flat=[figure for figure in curves if figure.flat],
        tokens=axis.title if axis is not None else None,
        samples=answers.samples(groups),
        columns=columns,
        questions=questions,
        absent=_without_column(groups, columns),
        levels=shading.LEVELS,
        documents=_shaded(groups),
        totals=facts.totals(runs[0]) if len(runs) == 1 else [],
        recipes=[facts.of_run(*each) for each in named],
        data=[facts.data_of(*each) for each in named],
        figures={picture.key: picture.as_json() for picture in (*above, *curves)},
        style=Markup(_own("page.css")),  # our own text, as is the script's
        script=Markup(script),
        plotly=_packed_plotly(),
        script_hashes=[_hash(script), _hash(get_plotlyjs())],
    )


def _without_column(groups: Sequence[Group], columns: Sequence[answers.Column]) -> list[str]:
    """Groups whose cartridge is not among the columns of all questions."""
    there = {column.place for column in columns if column.condition == TRAINED}
    return [group.name for place, group in enumerate(groups) if place not in there]


def _shaded(groups: Sequence[Group]) -> list[tuple[str, list[shading.Shown]]]:
    """The documents as each group's cartridge has them, its first seed's."""
    found = [(group.name, group.runs[0].shading) for group in groups]
    return [(name, shading.shown(each.documents)) for name, each in found if each is not None]


@cache
def _packed_plotly() -> str:
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _own(name: str) -> str:
    return (resources.files("cartridge_distill.report") / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """As Content-Security-Policy names a script that may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _figure(value: float | None) -> str:
    """Three digits after the point, with a minus sign as typographers set it."""
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _whole(sentence: str) -> str:
    """With no line's end between a number and its per cent sign."""
    return sentence.replace(" %", "\N{NO-BREAK SPACE}%")


def _confidence(runs: Sequence[Run]) -> str:
    found = sorted({f"{100 * run.evaluation.confidence:g} %" for run in runs if run.evaluation})
    return " or ".join(found)


# --- tables -------------------------------------------------------------------------------------


def condition_rows(groups: Sequence[Group]) -> list[Row]:
    """Least of the document first. What is the same in every run stands there once."""
    found: list[tuple[str, Row]] = []
    for place, group in enumerate(groups):
        for row in _mean_rows(group):
            trained = row.condition == TRAINED
            if not trained and any(
                name == row.condition and _same(row, other) for name, other in found
            ):
                continue
            name = row.condition
            if trained and len(groups) > 1:
                name = group.name
            elif any(seen == row.condition for seen, _ in found):
                name = f"{row.condition}, {group.name}"
            style = colours.of_run(place) if trained else colours.of_condition(row.condition)
            shown = Row(name, style, row.kv_tokens, row.metrics, row.positions)
            found.append((row.condition, shown))
    found.sort(key=lambda pair: condition_order(pair[0]))
    return [row for _, row in found]


def _same(row: Condition, other: Row) -> bool:
    """Whether both were measured alike: the intervals' ends differ with the seed that drew them."""
    return (
        row.kv_tokens == other.kv_tokens
        and row.metrics.keys() == other.metrics.keys()
        and all(_alike(each, other.metrics[metric]) for metric, each in row.metrics.items())
    )


def _alike(one: Interval | None, two: Interval | None) -> bool:
    if one is None or two is None:
        return one is two
    return one.n == two.n and math.isclose(one.mean, two.mean, rel_tol=1e-4, abs_tol=1e-6)


def _mean_rows(group: Group) -> list[Condition]:
    """A run's conditions; of several seeds, those that all have, with the mean of each metric.

    The mean of the intervals' ends is an interval of the mean, rather too wide: the error of a mean
    is at most the mean of the errors.
    """
    tables = [run.evaluation.conditions for run in group.runs if run.evaluation is not None]
    if not tables:
        return []
    rows = []
    for first in tables[0]:
        same = [row for table in tables for row in table if row.condition == first.condition]
        if len(same) < len(tables) or any(row.kv_tokens != first.kv_tokens for row in same):
            continue
        metrics = {metric: _mean([row.get(metric) for row in same]) for metric in first.metrics}
        along = positions.mean_positions([row.positions for row in same])
        rows.append(first.model_copy(update={"metrics": metrics, "positions": along}))
    return rows


def _mean(intervals: Sequence[Interval | None]) -> Interval | None:
    there = [each for each in intervals if each is not None]
    if len(there) < len(intervals):
        return None
    return Interval(
        mean=fmean(each.mean for each in there),
        low=fmean(each.low for each in there),
        high=fmean(each.high for each in there),
        n=there[0].n,
    )


def _standings(groups: Sequence[Group], axis: TokenAxis | None) -> dict[str, Any] | None:
    """Several recipes after equal tokens, from their validation curves."""
    if len(groups) < 2:
        return None
    found = {name: at_equal_tokens(groups, axis, name) for name, *_ in _METRICS}
    compared = {name: each for name, each in found.items() if each is not None}
    if not compared:
        return None
    first = next(iter(compared.values()))
    order = compared.get("kl", first).standings
    values = {
        name: {standing.group.name: standing for standing in each.standings}
        for name, each in compared.items()
    }
    return {
        "tokens": first.tokens,
        "metrics": [each for each in _METRICS if each[0] in compared],
        "rows": [
            {
                "name": standing.group.name,
                "style": colours.of_run(groups.index(standing.group)),
                "seeds": len(standing.values),
                "values": {name: values[name][standing.group.name] for name in compared},
            }
            for standing in order
        ],
    }
