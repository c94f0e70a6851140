"""Recipes side by side: mean and standard deviation over seeds of the trained cartridges' scores.

    python training/compare_table.py runs/compare/*/seed*

Reads what a run leaves in its folder: metrics.jsonl, recipe.json and the evaluation. The report
(`cartridge-distill report`) has the same runs with curves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from cartridge_distill.evaluation.names import FULL_DOCUMENT, TRAINED, UNTRAINED
from cartridge_distill.report.groups import Group, group_runs
from cartridge_distill.report.reading import Run, read_run
from cartridge_distill.util.errors import CartridgeDistillError, ReportError

_SCORES = (
    ("kl", "KL to full document"),
    ("log_loss", "log-loss of answer"),
    ("accuracy", "accuracy"),
)
_TOKENS = (
    ("tokens/total_trained", "tokens trained"),
    ("tokens/total_generated", "by student"),
    ("tokens/total_generated_by_teacher", "by teacher"),
)


def table(runs: Sequence[Run]) -> str:
    """A Markdown table: a recipe a line, and what they lie between.

    Raises:
        ReportError: a run was not evaluated.
    """
    groups = group_runs(runs)
    header = ["recipe", "seeds", *(title for _, title in _SCORES), *(title for _, title in _TOKENS)]
    body = [_ends(runs[0], UNTRAINED), *map(_line, groups), _ends(runs[0], FULL_DOCUMENT)]
    rule = ["---", *("--:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *body))


def _line(group: Group) -> list[str]:
    scores = [
        _with_spread([_score(run, TRAINED, name) for run in group.runs]) for name, _ in _SCORES
    ]
    return [group.name, str(len(group.runs)), *scores, *(_tokens(group, key) for key, _ in _TOKENS)]


def _ends(run: Run, condition: str) -> list[str]:
    """No recipe: a condition that is the same for all."""
    scores = [f"{_score(run, condition, name):.3f}" for name, _ in _SCORES]
    return [f"({condition})", "", *scores, *("" for _ in _TOKENS)]


def _score(run: Run, condition: str, metric: str) -> float:
    row = run.evaluation.get(condition) if run.evaluation is not None else None
    found = row.get(metric) if row is not None else None
    if found is None:
        raise ReportError(
            f"{run.folder} has no {metric} of the {condition}: run cartridge-distill eval with "
            f"--out {run.folder}"
        )
    return found.mean


def _with_spread(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def _tokens(group: Group, key: str) -> str:
    last = [points[-1][1] for run in group.runs if (points := run.metrics.series(key))]
    return f"{mean(last):,.0f}" if last else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of evaluated runs")
    options = parser.parse_args(arguments)
    try:
        print(table([read_run(folder) for folder in options.runs]))
    except CartridgeDistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
