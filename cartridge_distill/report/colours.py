"""One colour and one mark for each run and condition, the same in table, plots and samples.

The hues are those of Okabe and Ito's palette, which colour-blind readers can tell apart, shifted in
lightness until each has a contrast of 3 : 1 and more on both of the page's grounds, light and dark.
"""

from __future__ import annotations

from dataclasses import dataclass

from cartridge_distill.evaluation.names import (
    BEST_CHUNK,
    FULL_DOCUMENT,
    NO_DOCUMENT,
    TRAINED,
    UNTRAINED,
)

_BLUE, _VERMILION, _GREEN = "#2a7fd0", "#d5620e", "#0f9272"
_PINK, _OCHRE, _VIOLET = "#c25a9c", "#a97b12", "#8577d9"
_GREY, _STONE = "#7d858f", "#91806f"


@dataclass(frozen=True)
class Style:
    """A colour, plotly's marker symbol and dash."""

    colour: str
    symbol: str = "circle"
    dash: str = "solid"


CONDITIONS = {
    NO_DOCUMENT: Style(_GREY, "circle-open"),
    UNTRAINED: Style(_STONE, "square-open"),
    BEST_CHUNK: Style(_VIOLET, "triangle-up"),
    TRAINED: Style(_BLUE),
    FULL_DOCUMENT: Style(_GREEN, "diamond"),
}
_RUNS = (
    Style(_BLUE),
    Style(_VERMILION, "square"),
    Style(_PINK, "triangle-up"),
    Style(_OCHRE, "cross"),
    Style(_VIOLET, "x"),
    Style(_GREY, "star"),
)
_DASHES = ("solid", "dash", "dot", "dashdot")
BOUND = _VERMILION

STAGES = {
    "rollout": _BLUE,
    "update": _OCHRE,
    "sync": _GREEN,
    "validation": _PINK,
    "other": _GREY,
}


def of_run(place: int) -> Style:
    """Of the run or group at this place; past the colours, the dash tells them apart."""
    style = _RUNS[place % len(_RUNS)]
    return Style(style.colour, style.symbol, _DASHES[place // len(_RUNS) % len(_DASHES)])


def of_condition(name: str) -> Style:
    """Of a row of the table."""
    return CONDITIONS.get(name, Style(_OCHRE, "pentagon"))
