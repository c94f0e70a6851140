"""Divergence along the texts that conditions write themselves: where errors compound, it rises."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from cartridge_distill.report import colours
from cartridge_distill.report.figures import Figure, layout, translucent
from cartridge_distill.report.reading import Interval, Position

TITLES = {
    "student_kl": "KL to the teacher along the condition’s own text",
    "student_reverse_kl": "Reverse KL along the condition’s own text",
}


@dataclass(frozen=True)
class Line:
    """A condition: its name, its style, and its divergences by position."""

    name: str
    style: colours.Style
    positions: Sequence[Position]


def figures(lines: Sequence[Line]) -> list[Figure]:
    """A plot for each divergence that a condition was measured by."""
    found = (_figure(lines, metric, title) for metric, title in TITLES.items())
    return [figure for figure in found if figure is not None]


def mean_positions(tables: Sequence[Sequence[Position]]) -> list[Position]:
    """Of several seeds: the positions that all reached, with the mean of each interval."""
    by_place = [{(each.first, each.last): each for each in table} for table in tables]
    shared = [place for place in by_place[0] if all(place in table for table in by_place)]
    return [
        Position(first=place[0], last=place[1], **_means([table[place] for table in by_place]))
        for place in shared
    ]


def _means(same: Sequence[Position]) -> dict[str, Interval | None]:
    return {name: _mean([each.get(name) for each in same]) for name in TITLES}


def _mean(intervals: Sequence[Interval | None]) -> Interval | None:
    there = [each for each in intervals if each is not None]
    if len(there) < len(intervals):
        return None
    mean, low, high = (fmean(getattr(e, end) for e in there) for end in ("mean", "low", "high"))
    return Interval(mean=mean, low=low, high=high, n=there[0].n)


def _figure(lines: Sequence[Line], metric: str, title: str) -> Figure | None:
    plot = go.Figure(
        layout=layout(
            hovermode="closest",
            xaxis={
                "type": "log",
                "title": {"text": "position in the text, tokens", "standoff": 8},
                "zeroline": False,
                "showgrid": False,
                "tickvals": [1, 4, 16, 64, 256],
            },
        )
    )
    for line in lines:
        there = [(each, found) for each in line.positions if (found := each.get(metric))]
        if there:
            _draw(plot, line, there)
    if not plot.data:
        return None
    return Figure(f"positions-{metric}", title, "nats per token", plot, False)


def _draw(plot: Any, line: Line, there: Sequence[tuple[Position, Interval]]) -> None:
    # A bin stands at its middle, as the axis has it.
    places = [math.sqrt(each.first * each.last) for each, _ in there]
    name = html.escape(line.name)
    plot.add_scatter(
        x=[*places, *reversed(places)],
        y=[*(found.high for _, found in there), *(found.low for _, found in reversed(there))],
        fill="toself",
        fillcolor=translucent(line.style.colour),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        name=name,
    )
    plot.add_scatter(
        x=places,
        y=[found.mean for _, found in there],
        mode="lines+markers",
        line={"color": line.style.colour, "width": 2, "dash": line.style.dash},
        marker={"symbol": line.style.symbol, "size": 6, "color": line.style.colour},
        cliponaxis=False,
        customdata=[[each.first, each.last, found.low, found.high] for each, found in there],
        name=name,
        hovertemplate=name + ", tokens %{customdata[0]} to %{customdata[1]}: %{y:.3f} "
        "[%{customdata[2]:.3f}, %{customdata[3]:.3f}]<extra></extra>",
    )
