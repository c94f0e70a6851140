"""What is known of each run beside its figures: how it was started, and what it took."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from cartridge_distill.report.reading import Run

_COUNTED = (
    # (key of the log, whether it is a total already, what it counts)
    ("tokens/total_trained", True, "tokens trained on"),
    ("tokens/generated", False, "tokens written in rollouts"),
)


def totals(run: Run) -> list[str]:
    """Steps, tokens and time of a run, as far as its log has them."""
    steps = [step for step in run.metrics.steps if step > 0]
    found = [f"{len(steps):,} step{'s' if len(steps) != 1 else ''}"] if steps else []
    for key, is_total, what in _COUNTED:
        values = [value for _, value in run.metrics.series(key)]
        if values:
            found.append(f"{values[-1] if is_total else sum(values):,.0f} {what}")
    seconds = sum(value for _, value in run.metrics.series("timing_s/step"))
    if seconds:
        found.append(f"{_spelled(seconds)} of training")
    return found


def _spelled(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def of_run(name: str, run: Run) -> dict[str, Any]:
    """What repeats it: the command, the settings, the versions."""
    recipe, evaluation = run.recipe, run.evaluation
    facts: list[tuple[str, object]] = [("folder", run.folder)]
    if took := totals(run):
        facts.append(("took", ", ".join(took)))
    if recipe is not None:
        facts.append(("seed", recipe.seed))
        facts.append(("started", recipe.started))
    elif evaluation is not None:
        facts.append(("seed", evaluation.seed))
    if evaluation is not None:
        facts += [
            ("model", evaluation.model),
            ("model’s revision", evaluation.model_revision),
            ("cartridge", evaluation.cartridge),
        ]
    elif recipe is not None:
        facts.append(("model", recipe.model))
    if recipe is not None and recipe.git is not None:
        changed = ", with changes that are not committed" if recipe.git.changed else ""
        facts.append(("commit", recipe.git.commit + changed))
    versions = recipe.versions if recipe else evaluation.versions if evaluation else {}
    settings = recipe.environment if recipe else {}
    return {
        "name": name,
        "found": recipe is not None,
        "facts": [(what, str(value)) for what, value in facts if value is not None],
        "versions": sorted(versions.items()),
        "command": _typed(settings, recipe.command) if recipe else "",
        "overrides": recipe.overrides if recipe else [],
    }


def _typed(settings: dict[str, str], command: Sequence[str]) -> str:
    """As a shell takes it."""
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in settings.items()), shlex.join(command)])


def data_of(name: str, run: Run) -> dict[str, Any]:
    """All that the page is drawn from, for the download."""
    return {
        "name": name,
        "folder": str(run.folder),
        "recipe": run.recipe.model_dump() if run.recipe else None,
        "metrics": {str(step): row for step, row in run.metrics.by_step.items()},
        "evaluation": run.evaluation.model_dump() if run.evaluation else None,
        "questions": run.questions.rows() if run.questions else None,
    }
