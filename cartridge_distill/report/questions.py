"""Results question by question, and prompt by prompt, for intervals of paired ones.

What makes a question hard for every condition moves all their scores together. An interval of a
share that knows the single questions leaves that out; one made of three intervals cannot. The
questions stand in ``evaluation.parquet``, the held-out prompts in ``evaluation_prompts.parquet``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cartridge_distill.evaluation.results import PromptResult, QuestionResult
from cartridge_distill.util.errors import ReportError, with_fix
from cartridge_distill.util.parquet import read_rows

EVALUATE_AGAIN = "evaluate again, with `cartridge-distill eval RUN`"
# metric -> (summed over the questions, divided by the sum of); None counts the questions
_RATIOS: dict[str, tuple[str, str | None]] = {
    "log_loss": ("log_loss", None),
    "kl": ("kl_sum", "kl_tokens"),
    "prompt_kl": ("kl_sum", "kl_tokens"),
}
_TOLD = ["question", "right_answer", "likelihood_correct"]
_RESAMPLES = 10_000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Questions:
    """A table for each condition, all with the same questions in the same order.

    Attributes:
        asked: the questions with their right answers, in that order; empty where the file does not
            have them.
    """

    tables: Mapping[str, pd.DataFrame]
    asked: list[tuple[str, str]]

    def resampled(self, condition: str, metric: str, draws: Floats) -> Floats:
        """The metric in each resample.

        Args:
            draws: how often each resample holds each question, ``[R, N]``.

        Returns:
            ``[R]``.
        """
        above, below = _RATIOS[metric]
        table = self.tables[condition]
        weights = np.ones(len(table)) if below is None else table[below].to_numpy(float)
        found: Floats = (draws @ table[above].to_numpy(float)) / (draws @ weights)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Everything that was read, for a file of JSON."""
        found: list[dict[str, Any]] = json.loads(
            pd.concat(self.tables.values()).to_json(orient="records")
        )
        return found

    def draws(self, seed: int = 0) -> Floats:
        """10,000 resamples with replacement (Efron and Tibshirani 1993, chapter 13)."""
        count = len(next(iter(self.tables.values())))
        generator = np.random.default_rng(seed)
        return generator.multinomial(count, [1 / count] * count, size=_RESAMPLES).astype(float)


def read_questions(path: Path) -> Questions | None:
    """Reads the questions of an evaluation; None where the file is not there.

    Raises:
        ReportError: it is no parquet file, lacks columns, has others, or its conditions differ in
            questions.
    """
    known = QuestionResult.SCHEMA.names
    return _read(path, "question", known, ["log_loss", "kl_sum", "kl_tokens"], _TOLD)


def read_prompts(path: Path) -> Questions | None:
    """Reads the held-out prompts of an evaluation; as :func:`read_questions`."""
    return _read(path, "prompt", PromptResult.SCHEMA.names, ["kl_sum", "kl_tokens"], [])


def _read(
    path: Path, asked: str, known: list[str], columns: list[str], told: list[str]
) -> Questions | None:
    """``told`` are columns that may be absent, all together."""
    if not path.exists():
        return None
    keys = ["document_id", f"{asked}_index"]
    wanted = ["condition", *keys, *columns]
    try:
        rows = read_rows(path)
    except (OSError, ValueError) as error:
        raise ReportError(
            with_fix(f"{path}: no table with the columns {wanted}: {error}", EVALUATE_AGAIN)
        ) from None
    if absent := [name for name in wanted if name not in rows.columns]:
        raise ReportError(
            f"{path}: no table with the columns {wanted}: {', '.join(absent)} is missing; "
            f"fix: {EVALUATE_AGAIN}"
        )
    if unknown := [str(name) for name in rows.columns if name not in known]:
        raise ReportError(
            f"{path}: unknown columns: {', '.join(unknown)}; fix: evaluate again with this version"
        )
    has_texts = bool(told) and set(told) <= set(rows.columns)
    if rows.empty:
        raise ReportError(f"{path} holds no {asked}; fix: {EVALUATE_AGAIN}")
    tables = {name: found.sort_values(keys) for name, found in rows.groupby("condition")}
    first_name, first = next(iter(tables.items()))
    for name, table in tables.items():
        if table[keys].to_numpy().tolist() != first[keys].to_numpy().tolist():
            raise ReportError(
                f"{path}: {first_name!r} and {name!r} have other {asked}s; fix: {EVALUATE_AGAIN}"
            )
    texts = zip(*(first[name].astype(str) for name in _TOLD[:2]), strict=True) if has_texts else ()
    return Questions(tables, list(texts))
