"""A study's tables: mean and standard deviation over seeds, for every measure, with the cost.

Read from the folders of finished runs alone, so that they can be written at any time. Only the
fixed steps of the grid are shown, never the best one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cartridge_distill.cartridge.run_folder import METRICS_FILE
from cartridge_distill.data.records import load_questions
from cartridge_distill.evaluation.measure_rows import FREE, GREEDY, OWN_TEXTS_FILE
from cartridge_distill.evaluation.names import BEST_CHUNK, CONDITIONS, TRAINED
from cartridge_distill.evaluation.results import SUMMARY_FILE
from cartridge_distill.util import json_text
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.parquet import read_rows
from training.study.grid import Grid, Registration
from training.study.running import Place, place_of

Columns = Sequence[tuple[str, str, int]]
"""(score, heading, digits); a score that no run has is left out."""

_QUALITY: Columns = (
    ("kl", "KL", 3),
    ("log_loss", "log-loss", 2),
    ("accuracy", "accuracy", 2),
    ("generated_match", "match", 2),
    ("off_context_kl", "off context", 3),
)
_OWN_TEXT: Columns = (
    ("student_kl", "student KL", 3),
    ("student_kl_1_4", "1-4", 3),
    ("student_kl_5_16", "5-16", 3),
    ("student_kl_17_64", "17-64", 3),
    ("student_kl_65_256", "65-256", 3),
    ("student_reverse_kl", "student reverse KL", 3),
    ("topk_overlap", "top-20 overlap", 3),
    ("student_entropy", "entropy", 2),
    ("repetition", "repetition", 3),
    ("ended", "ended", 2),
    ("answer_tokens", "tokens", 0),
)
_COST: Columns = (
    ("tokens/total_trained", "tokens trained", 0),
    ("tokens/total_generated", "by student", 0),
    ("tokens/total_generated_by_teacher", "by teacher", 0),
    ("timing_s/step", "training, s", 0),
    ("timing_s/cpu", "CPU s", 0),
    ("actor/loss", "last loss", 3),
)
_SUMMED = ("timing_s/step", "timing_s/cpu")


@dataclass(frozen=True)
class Finished:
    """A run whose last step was evaluated.

    Attributes:
        place: its folder.
        lines: numbers of each step.
    """

    place: Place
    lines: list[dict[str, Any]]

    @classmethod
    def read(cls, place: Place) -> Finished:
        """Raises ConfigError where a file is missing."""
        path = place.folder / METRICS_FILE
        if not path.is_file():
            raise ConfigError(f"{place.folder} has no {METRICS_FILE}: the run is not finished")
        text = path.read_text(encoding="utf-8")
        return cls(place, [json.loads(line)["data"] for line in text.splitlines()])

    def cost(self, name: str) -> float:
        """Of the whole run: sums of seconds, else the last value."""
        if name in _SUMMED:
            return sum(float(line[name]) for line in self.lines)
        return float(self.lines[-1][name])


def scores(folder: Path, condition: str) -> dict[str, float]:
    """A condition's means in an evaluation's folder, with the match of each kind of question.

    Raises:
        ConfigError: there is no evaluation, or it has not the condition.
    """
    file = folder / SUMMARY_FILE
    if not file.is_file():
        raise ConfigError(f"{file} is not there: the run is not finished")
    rows = [row for row in json_text.load(file)["conditions"] if row["condition"] == condition]
    if not rows:
        raise ConfigError(f"{file} has no {condition!r}")
    return {name: found["mean"] for name, found in rows[0]["metrics"].items() if found is not None}


def match_by_kind(folder: Path, condition: str, questions: Path) -> dict[str, float]:
    """Kind of question -> ``generated_match``, of an evaluation's folder.

    Args:
        questions: the ``eval.json`` that was asked.
    """
    kinds = [question.kind for question in load_questions(questions)]
    rows = read_rows(folder / OWN_TEXTS_FILE)
    free = rows[
        (rows["condition"] == condition) & (rows["start"] == FREE) & (rows["sampling"] == GREEDY)
    ]
    found: dict[str, list[bool]] = {}
    for index, matched in zip(free["question_index"], free["matched"], strict=True):
        if kind := kinds[int(index)]:
            found.setdefault(kind, []).append(bool(matched))
    return {kind: mean(values) for kind, values in found.items()}


def tables(grid: Grid, registration: Registration, out: Path) -> str:
    """Markdown: for each document its qualities, own texts, fixed steps and costs.

    Raises:
        ConfigError: a run is not finished.
    """
    parts = [f"Model {grid.model}; {registration.words}."]
    for document in grid.documents:
        parts += [f"## {document}", *_of_document(grid, out, document)]
    return "\n\n".join(parts) + "\n"


def _of_document(grid: Grid, out: Path, document: str) -> list[str]:
    runs = {
        arm: [Finished.read(place_of(out, document, arm, seed)) for seed in grid.seeds]
        for arm in grid.arms
    }
    baseline = out / document / "conditions"
    questions = out / "data" / document / f"seed{grid.seeds[0]}" / "eval.json"
    parts = []
    for columns in (_QUALITY, _OWN_TEXT):
        body = [
            (f"({condition})", [scores(baseline, condition)])
            for condition in CONDITIONS
            if condition != TRAINED
        ]
        body += [
            (arm, [scores(_last(run, grid), TRAINED) for run in found])
            for arm, found in runs.items()
        ]
        parts.append(_table("condition", columns, body))
    kinds = match_by_kind(baseline, BEST_CHUNK, questions)
    if kinds:
        by_kind = [(kind, f"match, {kind}", 2) for kind in kinds]
        body = [
            (f"({condition})", [match_by_kind(baseline, condition, questions)])
            for condition in CONDITIONS
            if condition != TRAINED
        ]
        body += [
            (arm, [match_by_kind(_last(run, grid), TRAINED, questions) for run in found])
            for arm, found in runs.items()
        ]
        parts.append(_table("condition", by_kind, body))
    if len(grid.evaluate_at) > 1:
        parts.append(_by_step(grid, runs))
    costs = [
        (arm, [{name: run.cost(name) for name, *_ in _COST} for run in found])
        for arm, found in runs.items()
    ]
    parts.append(_table("arm", _COST, costs))
    return parts


def _last(run: Finished, grid: Grid) -> Path:
    return run.place.evaluation(grid.steps, grid.steps)


def _by_step(grid: Grid, runs: dict[str, list[Finished]]) -> str:
    columns = tuple(
        (f"{name}@{step}", f"{title}, step {step}", digits)
        for name, title, digits in (_QUALITY[0], _QUALITY[1], _OWN_TEXT[0])
        for step in grid.evaluate_at
    )

    def of(run: Finished) -> dict[str, float]:
        found: dict[str, float] = {}
        for step in grid.evaluate_at:
            at = scores(run.place.evaluation(step, grid.steps), TRAINED)
            found |= {f"{name}@{step}": value for name, value in at.items()}
        return found

    return _table(
        "arm", columns, [(arm, [of(run) for run in found]) for arm, found in runs.items()]
    )


def _table(first: str, columns: Columns, body: Sequence[tuple[str, list[dict[str, float]]]]) -> str:
    shown = [each for each in columns if any(each[0] in row for _, rows in body for row in rows)]
    lines = [[first, *(title for _, title, _ in shown)], ["---", *("--:" for _ in shown)]]
    for name, rows in body:
        lines.append([name, *(_cell([row.get(key) for row in rows], d) for key, _, d in shown)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cell(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    shown: Callable[[float], str] = lambda value: f"{value:,.{digits}f}"  # noqa: E731
    spread = f" ± {shown(stdev(known))}" if len(known) > 1 else ""
    return shown(mean(known)) + spread
