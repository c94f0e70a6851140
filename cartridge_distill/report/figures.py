"""The plots. Colours of ground, grid and text are the page's business: it follows light and dark.

Every curve carries its values against steps and against tokens (``meta``); the page shows the one
that is asked for. Names of runs go through :func:`html.escape`: plotly reads a subset of HTML.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from cartridge_distill.evaluation.names import BEST_CHUNK, FULL_DOCUMENT
from cartridge_distill.report import colours
from cartridge_distill.report.groups import Group, TokenAxis
from cartridge_distill.report.reading import Interval, Run

PERCENT = frozenset(
    {"accuracy", "generated_accuracy", "generated_match", "topk_overlap", "repetition", "ended"}
)
"""Metrics of a table that are shares of something."""

_LOSS = "actor/loss"
_BOUND = "actor/logprob_diff/bound"
_REFERENCES = {"val/kl": "kl", "val/log_loss": "log_loss", "val/accuracy": "accuracy"}
"""Curves of held-out questions, and the evaluation's metric of the same kind."""


@dataclass(frozen=True)
class Figure:
    """A plot with its heading, and what its axes show.

    Attributes:
        key: its id in the page.
        curve: whether its x axis is steps or tokens, as the reader chooses.
        flat: what it shows never changes, and is said here in words; "" where it does.
    """

    key: str
    title: str
    note: str
    plot: Any
    curve: bool = True
    flat: str = ""

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = self.plot.to_plotly_json()
        found["layout"].pop("template", None)
        return {"data": found["data"], "layout": found["layout"], "curve": self.curve}


@dataclass(frozen=True)
class _Curve:
    """What to draw from a key of the log."""

    key: str
    title: str
    note: str
    log: bool = False
    count: bool = False
    percent: bool = False


_VALIDATION = (
    _Curve("val/kl", "Held-out KL to the full document", "nats per token"),
    _Curve("val/log_loss", "Held-out log-loss of the right answer", "nats per token"),
    _Curve("val/accuracy", "Held-out accuracy", "multiple choice", percent=True),
)
_TRAINING = (
    _Curve(_LOSS, "Training loss", "per response token; by default the KL to the teacher"),
    _Curve("actor/loss_general", "Loss of general rows", "whose teacher is the bare model"),
    _Curve("actor/student_entropy", "Entropy of the student", "nats per response token"),
    _Curve(
        "actor/topk_overlap",
        "Top-k overlap",
        "of the teacher’s likeliest tokens, those that are the student’s",
        percent=True,
    ),
)
_OPTIMIZER = (
    _Curve("actor/grad_norm", "Gradient norm", "before it is clipped"),
    _Curve("actor/lr", "Learning rate", "of the step"),
)
_HEALTH = (
    _Curve(
        "actor/logprob_diff/max",
        "Server against trainer",
        "largest log-prob difference of a step",
        log=True,
    ),
    _Curve(
        "training/staleness",
        "Staleness",
        "optimizer steps from rollout to training",
        count=True,
    ),
    _Curve(
        "actor/on_policy_fraction",
        "On-policy fraction",
        "share of the batch that the student wrote",
        percent=True,
    ),
)


def curves(groups: Sequence[Group], axis: TokenAxis | None) -> list[Figure]:
    """Every curve of what was learned, that at least one run has."""
    figures = [_curve(spec, groups, axis) for spec in (*_VALIDATION, *_TRAINING)]
    return [figure for figure in figures if figure is not None]


def health(groups: Sequence[Group], axis: TokenAxis | None) -> list[Figure]:
    """Every curve of how the training went, that at least one run has."""
    figures = [_curve(spec, groups, axis) for spec in (*_OPTIMIZER, *_HEALTH)]
    return [figure for figure in figures if figure is not None]


def layout(**more: Any) -> dict[str, Any]:
    """What all plots have in common, and what one has besides."""
    return {
        "template": "none",
        "margin": {"l": 52, "r": 14, "t": 10, "b": 44},
        "height": 270,
        "showlegend": False,
        "hovermode": "x unified",
        "xaxis": {
            "title": {"text": "step", "standoff": 8},
            "zeroline": False,
            "showgrid": False,
        },
        "yaxis": {
            "zeroline": False,
            "nticks": 6,
            "automargin": True,
            "ticklabelstandoff": 5,
            "exponentformat": "power",
        },
        **more,
    }


def _curve(spec: _Curve, groups: Sequence[Group], axis: TokenAxis | None) -> Figure | None:
    figure = go.Figure(layout=layout())
    for place, group in enumerate(groups):
        _draw_group(figure, spec, group, place, axis)
    if not figure.data:
        return None
    if spec.log:
        figure.update_yaxes(type="log", dtick=1)
    if spec.count:
        largest = max(max(trace.y) for trace in figure.data)
        figure.update_yaxes(range=[-0.05, max(1.1, 1.1 * largest)], tickformat="d", nticks=None)
        if largest <= 5:
            figure.update_yaxes(dtick=1)
    if spec.percent:
        figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.03])
    flat = _flat(spec, [value for trace in figure.data for value in trace.y])
    if spec.key == "actor/logprob_diff/max":
        _draw_bound(figure, groups, axis)
    if spec.key in _REFERENCES:
        _draw_references(figure, _REFERENCES[spec.key], groups, axis)
    return Figure(spec.key.replace("/", "-"), spec.title, spec.note, figure, flat=flat)


def _flat(spec: _Curve, values: Sequence[float]) -> str:
    """The one value that a curve has throughout."""
    if min(values) != max(values):
        return ""
    return f"{100 * values[0]:.0f} %" if spec.percent else f"{values[0]:.3g}"


def _draw_group(
    figure: Any, spec: _Curve, group: Group, place: int, axis: TokenAxis | None
) -> None:
    """One run: its line. Several: their mean, in a band from the least to the greatest."""
    values = {id(run): dict(run.metrics.series(spec.key)) for run in group.runs}
    steps = sorted(set.intersection(*(set(found) for found in values.values())))
    if not steps:
        return
    at_step = [[values[id(run)][step] for run in group.runs] for step in steps]
    mean = [sum(found) / len(found) for found in at_step]
    meta = places_of(steps, group.runs, axis)
    style = colours.of_run(place)
    name = html.escape(group.name)
    if len(group.runs) > 1:
        low, high = [min(found) for found in at_step], [max(found) for found in at_step]
        there_and_back = {key: [*there, *reversed(there)] for key, there in meta.items()}
        figure.add_scatter(
            x=there_and_back["step"],
            y=[*high, *reversed(low)],
            meta=there_and_back,
            fill="toself",
            fillcolor=translucent(style.colour),
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            legendgroup=str(place),
            name=name,
        )
    # Validations are few: a mark shows where each was made.
    figure.add_scatter(
        x=meta["step"],
        y=mean,
        meta=meta,
        mode="lines+markers" if len(steps) <= 24 else "lines",
        line={"color": style.colour, "width": 2, "dash": style.dash},
        marker={"symbol": style.symbol, "size": 6, "color": style.colour},
        cliponaxis=False,
        legendgroup=str(place),
        name=name,
        hovertemplate="%{y:.3~g}" if not spec.percent else "%{y:.0%}",
    )


def places_of(
    steps: Sequence[int], runs: Sequence[Run], axis: TokenAxis | None
) -> dict[str, list[float]]:
    """Where a curve's points lie against steps, and (mean over the runs) against tokens."""
    found: dict[str, list[float]] = {"step": list(steps)}
    if axis is not None:
        found["tokens"] = [sum(axis.at(run, step) for run in runs) / len(runs) for step in steps]
    return found


def _draw_bound(figure: Any, groups: Sequence[Group], axis: TokenAxis | None) -> None:
    """The bound past which a run ends, where the log has it, from its first to its last step."""
    longest: dict[float, Run] = {}
    for run in (run for group in groups for run in group.runs):
        for _, bound in run.metrics.series(_BOUND)[:1]:
            other = longest.get(bound)
            if other is None or run.metrics.steps[-1] > other.metrics.steps[-1]:
                longest[bound] = run
    for bound, run in sorted(longest.items()):
        meta = places_of([run.metrics.steps[0], run.metrics.steps[-1]], [run], axis)
        figure.add_scatter(
            x=meta["step"],
            y=[bound, bound],
            meta=meta,
            mode="lines+text",
            line={"dash": "dot", "width": 1.5, "color": colours.BOUND},
            text=["", f"bound {bound:g}"],
            textposition="top left",
            cliponaxis=False,
            name="bound",
            hoverinfo="skip",
        )


def _draw_references(
    figure: Any, metric: str, groups: Sequence[Group], axis: TokenAxis | None
) -> None:
    """What the best chunk and the full document come to in the evaluation of the same questions.

    Only where one group is drawn: the questions of several runs may differ.
    """
    evaluation = groups[0].runs[0].evaluation if len(groups) == 1 else None
    if evaluation is None:
        return
    steps = sorted({place for trace in figure.data for place in trace.meta["step"]})
    meta = places_of([steps[0], steps[-1]], groups[0].runs, axis)
    for name in (BEST_CHUNK, FULL_DOCUMENT):
        row = evaluation.get(name)
        found = row.get(metric) if row is not None else None
        if found is None:
            continue
        colour = colours.of_condition(name).colour
        figure.add_scatter(
            x=meta["step"],
            y=[found.mean, found.mean],
            meta=meta,
            mode="lines+text",
            line={"dash": "dot", "width": 1.5, "color": colour},
            text=["", name],
            textposition="top left",
            textfont={"color": colour},
            cliponaxis=False,
            name=name,
            hoverinfo="skip",
        )


# --- the table as a picture ---------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """A row of the table: its name, its style, and its interval of each metric."""

    name: str
    style: colours.Style
    metrics: dict[str, Interval | None]


def conditions(marks: Sequence[Mark], metric: str, title: str, note: str) -> Figure | None:
    """One metric of every row, with its interval."""
    shown = [(mark, found) for mark in marks if (found := mark.metrics.get(metric)) is not None]
    if not shown:
        return None
    names = [html.escape(mark.name) for mark, _ in shown]
    percent = metric in PERCENT
    figure = go.Figure(
        go.Scatter(
            x=[found.mean for _, found in shown],
            y=names,
            mode="markers",
            marker={
                "size": 11,
                "color": [mark.style.colour for mark, _ in shown],
                "symbol": [mark.style.symbol for mark, _ in shown],
                "line": {"width": 2, "color": [mark.style.colour for mark, _ in shown]},
            },
            cliponaxis=False,
            customdata=[[found.low, found.high] for _, found in shown],
            hovertemplate="%{y}: %{x:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]"
            "<extra></extra>",
        ),
        layout=layout(
            height=78 + 34 * len(shown),
            hovermode="closest",
            margin={"l": 10, "r": 18, "t": 6, "b": 40},
            xaxis={"zeroline": False, "nticks": 6, "title": {"text": note, "standoff": 8}},
            yaxis={
                "automargin": True,
                "autorange": False,
                "range": [len(shown) - 0.4, -0.6],
                "showgrid": True,
                "ticks": "",
                "ticklabelstandoff": 8,
            },
        ),
    )
    for name, (mark, found) in zip(names, shown, strict=True):
        figure.add_scatter(
            x=[found.low, found.high],
            y=[name, name],
            mode="lines",
            line={"color": mark.style.colour, "width": 3},
            opacity=0.55,
            hoverinfo="skip",
        )
    if percent:
        figure.update_xaxes(tickformat=".0%", range=[-0.03, 1.03])
    else:
        ends = [end for _, found in shown for end in (found.low, found.high)]
        figure.update_xaxes(range=[min(0.0, *ends), 1.04 * max(0.0, *ends) or 1.0])
    return Figure(f"conditions-{metric}", title, "", figure, False)


def translucent(colour: str) -> str:
    """A colour ``#rrggbb`` as the ground of a band."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.2)"
