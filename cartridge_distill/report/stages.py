"""Where the seconds of a step go."""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from cartridge_distill.report import colours
from cartridge_distill.report.figures import Figure, layout, places_of
from cartridge_distill.report.groups import Group, TokenAxis
from cartridge_distill.report.reading import Metrics, Run

_STAGES = {
    "rollout": "timing_s/rollout",
    "update": "timing_s/update",
    "sync": "timing_s/update_weights",
    "validation": "timing_s/testing",
}
_STEP_SECONDS = "timing_s/step"
_LEGEND_ABOVE = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "traceorder": "normal"}


def stages(groups: Sequence[Group], axis: TokenAxis | None) -> Figure | None:
    """One run: stacked bars over its steps. Several: a bar for each group, of its mean step."""
    if len(groups) == 1 and len(groups[0].runs) == 1:
        return _stages_of_one(groups[0].runs[0], axis)
    means = [(html.escape(group.name), _mean_seconds(group)) for group in groups]
    figure = go.Figure(
        layout=layout(
            barmode="stack",
            hovermode="closest",
            showlegend=True,
            height=max(270, 110 + 34 * len(groups)),
            xaxis={"title": {"text": "seconds a step", "standoff": 8}, "zeroline": False},
            yaxis={"automargin": True, "autorange": "reversed"},
            legend=_LEGEND_ABOVE,
        )
    )
    for stage, colour in colours.STAGES.items():
        named = [(name, seconds[stage]) for name, seconds in means if stage in seconds]
        if named:
            figure.add_bar(
                y=[name for name, _ in named],
                x=[seconds for _, seconds in named],
                orientation="h",
                name=stage,
                marker={"color": colour},
                hovertemplate="%{y}: " + stage + " %{x:.2f} s<extra></extra>",
            )
    if not figure.data:
        return None
    return Figure("stages", "Stage times", "mean seconds of a step, after the first", figure, False)


def _mean_seconds(group: Group) -> dict[str, float]:
    """Of each stage in a step; the first step starts the workers and is left out."""
    found: dict[str, list[float]] = {}
    for run in group.runs:
        for stage, seconds in _seconds(run.metrics)[1].items():
            found.setdefault(stage, []).extend(seconds[1:] or seconds)
    return {stage: sum(seconds) / len(seconds) for stage, seconds in found.items()}


def _stages_of_one(run: Run, axis: TokenAxis | None) -> Figure | None:
    steps, found = _seconds(run.metrics)
    if not found:
        return None
    figure = go.Figure(
        layout=layout(
            barmode="stack",
            bargap=0,
            showlegend=True,
            legend=_LEGEND_ABOVE,
        )
    )
    meta = places_of(steps, [run], axis)
    for stage, seconds in found.items():
        figure.add_bar(
            x=meta["step"],
            y=seconds,
            meta=meta,
            name=stage,
            marker={"color": colours.STAGES[stage], "line": {"width": 0}},
            hovertemplate="%{y:.2f} s",
        )
    return Figure("stages", "Stage times", "seconds a step, stacked", figure)


def _seconds(metrics: Metrics) -> tuple[list[int], dict[str, list[float]]]:
    """Steps that were timed, and the seconds of each stage in them; stages that never ran left out.

    "other" is what veRL's step took beyond the named stages.
    """
    steps = [
        step
        for step, row in metrics.by_step.items()
        if any(row.get(key) is not None for key in _STAGES.values())
    ]
    rows = [metrics.by_step[step] for step in steps]
    found = {stage: [row.get(key) or 0.0 for row in rows] for stage, key in _STAGES.items()}
    found["other"] = [
        max(0.0, (row.get(_STEP_SECONDS) or 0.0) - sum(found[stage][place] for stage in _STAGES))
        for place, row in enumerate(rows)
    ]
    return steps, {stage: seconds for stage, seconds in found.items() if any(seconds)}
