"""A run's folder, read: ``metrics.jsonl``, what the evaluation wrote, ``recipe.json``.

Keys and files that are absent leave something out of the report. What is there and malformed is an
error that names file and line: a report drawn from half a file would look like a result.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from cartridge_distill.cartridge.run_folder import METRICS_FILE
from cartridge_distill.evaluation.names import BEST_CHUNK, CONDITIONS, NO_DOCUMENT, TRAINED
from cartridge_distill.evaluation.results import PROMPTS_FILE, QUESTIONS_FILE
from cartridge_distill.report.questions import (
    EVALUATE_AGAIN,
    Questions,
    read_prompts,
    read_questions,
)
from cartridge_distill.report.recipe import RECIPE_FILE, Recipe
from cartridge_distill.report.shading import SHADING_FILE, Shading
from cartridge_distill.util.errors import ReportError
from cartridge_distill.util.json_text import no_name_twice

EVALUATION_FILE = "evaluation.json"
_ANOTHER_COPY = "take another copy of the run, or delete the line"

_OTHER_NAMES = {"no cartridge": NO_DOCUMENT, "retrieved chunk": BEST_CHUNK}

# What the report draws from; veRL logs more, and a new release may log other things than numbers.
_DRAWN = ("actor/", "perf/", "timing_s/", "tokens/", "training/", "val/")

Point = tuple[int, float]
M = TypeVar("M", bound=BaseModel)


class Interval(BaseModel):
    """A mean with its confidence interval over ``n`` questions."""

    mean: float = Field(allow_inf_nan=False)
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)
    n: int | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"the interval's low end {self.low} is above its high end {self.high}")
        return self


class Position(BaseModel):
    """Divergences at some positions of the texts that a condition wrote; None where none was."""

    first: int = Field(ge=1)
    last: int
    student_kl: Interval | None = None
    student_reverse_kl: Interval | None = None

    def get(self, metric: str) -> Interval | None:
        """By its name in the evaluation's metrics."""
        found = {"student_kl": self.student_kl, "student_reverse_kl": self.student_reverse_kl}
        return found[metric]


class Condition(BaseModel):
    """One row of the table. ``metrics`` by name; None where one was not measured."""

    condition: str
    kv_tokens: int
    metrics: dict[str, Interval | None]
    positions: list[Position] = []

    def get(self, metric: str) -> Interval | None:
        """The interval of a metric; None where it was not measured."""
        return self.metrics.get(metric)


class Sample(BaseModel):
    """A question, and what each condition answers."""

    question: str
    right_answer: str
    answers: dict[str, str]


class Evaluation(BaseModel):
    """The contents of ``evaluation.json``."""

    conditions: list[Condition]
    samples: list[Sample] = []
    confidence: float = Field(default=0.95, gt=0, lt=1)
    model: str | None = None
    model_revision: str | None = None
    cartridge: str | None = None
    seed: int | None = None
    versions: dict[str, str] = {}

    def get(self, condition: str) -> Condition | None:
        """A condition's row; None where it was not asked for."""
        return next((row for row in self.conditions if row.condition == condition), None)

    @model_validator(mode="after")
    def _one_name_each(self) -> Self:
        for row in self.conditions:
            row.condition = _OTHER_NAMES.get(row.condition, row.condition)
        for sample in self.samples:
            sample.answers = {_OTHER_NAMES.get(k, k): text for k, text in sample.answers.items()}
        names = [row.condition for row in self.conditions]
        if len(set(names)) != len(names):
            raise ValueError(f"a condition stands there twice: {names}")
        self.conditions.sort(key=lambda row: condition_order(row.condition))
        return self


def condition_order(name: str) -> int:
    """Known conditions from least to most of the document; others come before the full one."""
    return CONDITIONS.index(name) if name in CONDITIONS else CONDITIONS.index(TRAINED)


@dataclass(frozen=True)
class Metrics:
    """``metrics.jsonl``: a dict of numbers for each step, ascending; None stands for a NaN."""

    by_step: dict[int, dict[str, float | None]]

    @property
    def steps(self) -> list[int]:
        """Ascending."""
        return list(self.by_step)

    def series(self, key: str) -> list[Point]:
        """(step, value) where the key was logged as a finite number."""
        return [
            (step, value)
            for step, row in self.by_step.items()
            if (value := row.get(key)) is not None and math.isfinite(value)
        ]

    def has(self, key: str) -> bool:
        """Whether any step logged a number under the key."""
        return any(row.get(key) is not None for row in self.by_step.values())


@dataclass(frozen=True)
class Run:
    """A run's folder. None for a file that is not there."""

    folder: Path
    metrics: Metrics
    evaluation: Evaluation | None
    questions: Questions | None
    prompts: Questions | None
    shading: Shading | None
    recipe: Recipe | None

    @property
    def seed(self) -> int | None:
        """As the recipe says, else as the evaluation does; None where nothing does."""
        if self.recipe is not None:
            return self.recipe.seed
        return self.evaluation.seed if self.evaluation is not None else None


def read_run(folder: Path) -> Run:
    """Reads what is there.

    Raises:
        ReportError: there is no such folder, no metrics, or a file is malformed.
    """
    if not folder.is_dir():
        raise ReportError(f"{folder} is no folder of a run; fix: name one with its {METRICS_FILE}")
    evaluated = _evaluation_folder(folder)
    return Run(
        folder,
        read_metrics(folder / METRICS_FILE),
        _read_json(evaluated / EVALUATION_FILE, Evaluation),
        read_questions(evaluated / QUESTIONS_FILE),
        read_prompts(evaluated / PROMPTS_FILE),
        _read_json(evaluated / SHADING_FILE, Shading),
        _read_json(folder / RECIPE_FILE, Recipe, "take another copy of the run"),
    )


def _evaluation_folder(run: Path) -> Path:
    """Where the evaluation wrote: the run's folder, or ``evaluation/`` in it."""
    found = [place for place in (run, run / "evaluation") if (place / EVALUATION_FILE).exists()]
    if len(found) > 1:
        raise ReportError(
            f"{run} holds two evaluations, {EVALUATION_FILE} and evaluation/{EVALUATION_FILE}; "
            "fix: move one away"
        )
    return found[0] if found else run


def read_metrics(path: Path) -> Metrics:
    """Reads veRL's file log: a line ``{"step": N, "data": {...}}`` for each time it logged.

    Lines of one step are joined. After a resume that repeats steps, the later line counts.

    Raises:
        ReportError: it is not there, is empty, or a line is not such a line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ReportError(
            f"{path} is not there; fix: train with trainer.logger=[console,file] and "
            f"VERL_FILE_LOGGER_PATH={path}"
        ) from None
    except UnicodeDecodeError as error:
        raise ReportError(f"{path} is not UTF-8: {error}; fix: {_ANOTHER_COPY}") from None
    by_step: dict[int, dict[str, float | None]] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        step, data = _read_line(line, f"{path}:{number}")
        by_step.setdefault(step, {}).update(data)
    if not by_step:
        raise ReportError(f"{path} holds no step; fix: wait until the run has finished its first")
    return Metrics(dict(sorted(by_step.items())))


def _read_line(line: str, place: str) -> tuple[int, dict[str, float | None]]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ReportError(
            f"{place}: not JSON ({error}); fix: delete a line that a killed run left half written"
        ) from None
    if not isinstance(record, dict) or not isinstance(record.get("data"), dict):
        raise ReportError(
            f'{place}: expected {{"step": N, "data": {{...}}}}, found {line[:80]!r}; '
            f"fix: {_ANOTHER_COPY}"
        )
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ReportError(
            f"{place}: the step is {step!r}, not a whole number from 0; fix: {_ANOTHER_COPY}"
        )
    return step, {
        key: _number(value, key, place)
        for key, value in record["data"].items()
        if key.startswith(_DRAWN)
    }


def _number(value: Any, key: str, place: str) -> float | None:
    if value is None:  # how veRL's log writes a NaN
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ReportError(f"{place}: {key} is {value!r}, not a number; fix: {_ANOTHER_COPY}")
    return float(value)


def _read_json(path: Path, kind: type[M], fix: str = EVALUATE_AGAIN) -> M | None:
    if not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        return kind.model_validate(json.loads(text, object_pairs_hook=no_name_twice))
    except RecursionError:
        raise ReportError(f"{path} is nested too deep for a file of ours; fix: {fix}") from None
    except json.JSONDecodeError as error:
        raise ReportError(f"{path}:{error.lineno}: not JSON ({error.msg}); fix: {fix}") from None
    except UnicodeDecodeError as error:
        raise ReportError(f"{path} is not UTF-8: {error}; fix: {fix}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise ReportError(f"{path}: {where}: {first['msg']}; fix: {fix}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ReportError(f"{path}: not JSON that is read: {error}; fix: {fix}") from None
