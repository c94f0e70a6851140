"""Results: a row a question and condition, and what they come to.

``evaluation.parquet`` holds the rows of the questions, ``evaluation_prompts.parquet`` those of
held-out prompts where they were asked for, two more tables those of ``--measures``, and
``evaluation.json`` the summary. docs/evaluation.md describes them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from cartridge_distill.evaluation.bootstrap import (
    CONFIDENCE,
    Estimate,
    Ratio,
    estimate,
    estimate_difference,
)
from cartridge_distill.evaluation.measure_rows import (
    OFF_CONTEXT_FILE,
    OWN_TEXTS_FILE,
    OffContext,
    OwnText,
)
from cartridge_distill.evaluation.measures import SCORES, MeasureRows, by_text, curve, measured
from cartridge_distill.evaluation.names import TRAINED, UNTRAINED
from cartridge_distill.util import json_text
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.parquet import write_table

QUESTIONS_FILE = "evaluation.parquet"
PROMPTS_FILE = "evaluation_prompts.parquet"
SUMMARY_FILE = "evaluation.json"


@dataclass(frozen=True)
class QuestionResult:
    """One question under one condition; the columns of ``evaluation.parquet``.

    Attributes:
        kl_sum: nats, over the ``kl_tokens`` tokens of the teacher's answer.
        log_loss: nats per token of the right option.
        likelihood_choice: place of the likeliest option.
        generated_text, generated_choice, generated_correct: None where none was generated; the
            choice is None, and wrong, where the text names no option.
    """

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [
            ("condition", pa.string()),
            ("document_id", pa.string()),
            ("question_index", pa.int64()),
            ("question", pa.string()),
            ("right_answer", pa.string()),
            ("seed", pa.int64()),
            ("kl_sum", pa.float64()),
            ("kl_tokens", pa.int64()),
            ("log_loss", pa.float64()),
            ("likelihood_choice", pa.int64()),
            ("likelihood_correct", pa.bool_()),
            ("generated_text", pa.string()),
            ("generated_choice", pa.int64()),
            ("generated_correct", pa.bool_()),
            ("kv_tokens", pa.int64()),
        ]
    )

    condition: str
    document_id: str
    question_index: int
    question: str
    right_answer: str
    seed: int
    kl_sum: float
    kl_tokens: int
    log_loss: float
    likelihood_choice: int
    likelihood_correct: bool
    generated_text: str | None
    generated_choice: int | None
    generated_correct: bool | None
    kv_tokens: int


@dataclass(frozen=True)
class PromptResult:
    """One held-out prompt under one condition; the columns of ``evaluation_prompts.parquet``."""

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [
            ("condition", pa.string()),
            ("document_id", pa.string()),
            ("prompt_index", pa.int64()),
            ("prompt", pa.string()),
            ("seed", pa.int64()),
            ("kl_sum", pa.float64()),
            ("kl_tokens", pa.int64()),
            ("kv_tokens", pa.int64()),
        ]
    )

    condition: str
    document_id: str
    prompt_index: int
    prompt: str
    seed: int
    kl_sum: float
    kl_tokens: int
    kv_tokens: int


@dataclass(frozen=True)
class Results:
    """All rows of an evaluation."""

    questions: list[QuestionResult]
    prompts: list[PromptResult]
    measures: MeasureRows = field(default_factory=MeasureRows)

    @property
    def conditions(self) -> list[str]:
        """In the order in which they were evaluated."""
        named = [row.condition for row in self.questions] + [row.condition for row in self.prompts]
        return list(dict.fromkeys(named))

    def of(self, condition: str) -> tuple[list[QuestionResult], list[PromptResult]]:
        """A condition's rows, in the order of the questions and of the prompts."""
        questions = [row for row in self.questions if row.condition == condition]
        prompts = [row for row in self.prompts if row.condition == condition]
        return (
            sorted(questions, key=lambda row: row.question_index),
            sorted(prompts, key=lambda row: row.prompt_index),
        )

    def write(self, folder: Path) -> list[Path]:
        """Writes the rows; returns the files. Tables are replaced whole."""
        written = []
        for name, kind, rows in (
            (QUESTIONS_FILE, QuestionResult, self.questions),
            (PROMPTS_FILE, PromptResult, self.prompts),
            (OWN_TEXTS_FILE, OwnText, self.measures.texts),
            (OFF_CONTEXT_FILE, OffContext, self.measures.off_context),
        ):
            (folder / name).unlink(missing_ok=True)  # of an earlier evaluation
            if rows:
                table = pa.Table.from_pylist([asdict(row) for row in rows], schema=kind.SCHEMA)
                write_table(table, folder / f"{name}.part")
                (folder / f"{name}.part").replace(folder / name)
                written.append(folder / name)
        return written


Metric = Callable[[list[QuestionResult], list[PromptResult]], Ratio | None]


def _kl(rows: Sequence[QuestionResult] | Sequence[PromptResult]) -> Ratio | None:
    if not rows:
        return None
    return Ratio([row.kl_sum for row in rows], [float(row.kl_tokens) for row in rows])


def _mean(values: Sequence[float | bool | None]) -> Ratio | None:
    known = [float(value) for value in values if value is not None]
    return Ratio.mean_of(known) if known else None


METRICS: dict[str, Metric] = {
    "kl": lambda questions, _: _kl(questions),
    "log_loss": lambda questions, _: _mean([row.log_loss for row in questions]),
    "accuracy": lambda questions, _: _mean([row.likelihood_correct for row in questions]),
    "generated_accuracy": lambda questions, _: _mean([row.generated_correct for row in questions]),
    "prompt_kl": lambda _, prompts: _kl(prompts),
}
"""A score's name in the summary -> the ratio it is; None where it was not asked for."""


def estimates(results: Results, condition: str, seed: int) -> dict[str, Estimate | None]:
    """Each metric of a condition with its interval."""
    ratios = _ratios(results, condition)
    return {
        name: None if ratio is None else estimate(ratio, seed) for name, ratio in ratios.items()
    }


def differences(
    results: Results, condition: str, baseline: str, seed: int
) -> dict[str, Estimate | None]:
    """``condition - baseline`` of each metric, paired by question, with its interval."""
    found: dict[str, Estimate | None] = {}
    seconds = _ratios(results, baseline)
    for name, first in _ratios(results, condition).items():
        second = seconds[name]
        if first is None or second is None or not (first.counting & second.counting).any():
            found[name] = None
        else:
            found[name] = estimate_difference(first, second, seed)
    return found


def _ratios(results: Results, condition: str) -> dict[str, Ratio | None]:
    """Each score; those of a group of measures only where the group was asked for."""
    rows, more = results.of(condition), results.measures.of(condition)
    found = {name: metric(*rows) for name, metric in METRICS.items()}
    return found | {name: SCORES[name](more) for name in measured(results.measures)}


def kv_tokens(results: Results, condition: str) -> int:
    """The most KV tokens that any question had before it."""
    return max(row.kv_tokens for rows in results.of(condition) for row in rows)


def summarise(results: Results, described: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What ``evaluation.json`` holds, less its samples.

    Args:
        described: model, revision, cartridge, versions.
    """
    names = results.conditions
    pairs = [(TRAINED, UNTRAINED)] if {TRAINED, UNTRAINED} <= set(names) else []
    return {
        **described,
        "seed": seed,
        "confidence": CONFIDENCE,
        "conditions": [
            {
                "condition": name,
                "kv_tokens": kv_tokens(results, name),
                "metrics": _plain(estimates(results, name, seed)),
                **_of_texts(results.measures.of(name), seed),
            }
            for name in names
        ],
        "differences": [
            {
                "condition": name,
                "baseline": other,
                "metrics": _plain(differences(results, name, other, seed)),
            }
            for name, other in pairs
        ],
    }


def _of_texts(rows: MeasureRows, seed: int) -> dict[str, Any]:
    """What own texts say beyond scores of all of them together."""
    if not rows.texts:
        return {}
    return {"positions": curve(rows, seed), "texts": by_text(rows, seed)}


def _plain(found: Mapping[str, Estimate | None]) -> dict[str, Any]:
    return {name: value and dataclasses.asdict(value) for name, value in found.items()}


def check_replaceable(folder: Path, journal: str) -> None:
    """Is what lies under the names of the results an earlier evaluation's?

    Args:
        journal: name of an unfinished evaluation's journal.

    Raises:
        ConfigError: it is not, or cannot be told to be.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file; fix: name a folder")
    summary = folder / SUMMARY_FILE
    tables = (QUESTIONS_FILE, PROMPTS_FILE, OWN_TEXTS_FILE, OFF_CONTEXT_FILE)
    there = [name for name in tables if (folder / name).exists()]
    try:
        ours = {"conditions", "confidence", "seed"} <= set(json_text.load(summary))
    except FileNotFoundError:
        ours = (folder / journal).exists() or not there  # stopped before its last file
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        there += [SUMMARY_FILE] if summary.exists() else []
        raise ConfigError(
            f"--out {folder} holds {', '.join(there)}, which no evaluation wrote; fix: name "
            "another folder, or move them away"
        )


def write_summary(folder: Path, summary: Mapping[str, Any]) -> Path:
    """Writes ``evaluation.json``, whole or not at all."""
    target, part = folder / SUMMARY_FILE, folder / f"{SUMMARY_FILE}.part"
    part.write_text(json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    part.replace(target)
    return target
