"""What is done of an evaluation, on disk, so that a killed one goes on.

A row is known by its kind, condition and index, so nothing is done twice, whatever the order. A
journal of other settings is set aside, never mixed in and never deleted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cartridge_distill.evaluation.measure_rows import OffContext, OwnText
from cartridge_distill.evaluation.measures import MeasureRows
from cartridge_distill.evaluation.results import PromptResult, QuestionResult, Results
from cartridge_distill.util import journal
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.same_settings import OtherSettings

JOURNAL_FILE = "evaluation.journal.jsonl"

Row = QuestionResult | PromptResult | OwnText | OffContext
Key = tuple[str, str, int]
_KINDS: dict[str, type[Row]] = {
    "question": QuestionResult,
    "prompt": PromptResult,
    "own_text": OwnText,
    "off_context": OffContext,
}


def question_key(condition: str, index: int) -> Key:
    return "question", condition, index


def prompt_key(condition: str, index: int) -> Key:
    return "prompt", condition, index


def own_text_key(condition: str, index: int) -> Key:
    return "own_text", condition, index


def off_context_key(condition: str, index: int) -> Key:
    return "off_context", condition, index


def _key(row: Row) -> Key:
    if isinstance(row, QuestionResult):
        return question_key(row.condition, row.question_index)
    if isinstance(row, PromptResult):
        return prompt_key(row.condition, row.prompt_index)
    if isinstance(row, OwnText):
        return own_text_key(row.condition, row.index)
    return off_context_key(row.condition, row.prompt_index)


class Journal:
    """The rows that are done; a context manager.

    Args:
        folder: that the evaluation writes to.
        settings: everything that the rows depend on, as plain JSON values.
        say: takes a line for the user.

    Raises:
        ConfigError: the file is not a journal, or another evaluation writes to it.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self.path = folder / JOURNAL_FILE
        try:
            self._file = journal.Journal(self.path, settings)
        except OtherSettings as error:
            say(f"{self.path} is of an evaluation with other settings: {', '.join(error.names)}")
            self._set_aside(say)
            self._file = journal.Journal(self.path, settings)
        self._rows = self._read()
        if self._rows:
            say(f"going on where an evaluation stopped: {len(self._rows)} rows are in {self.path}")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def add(self, rows: Sequence[Row]) -> None:
        """Writes rows; when it returns, they outlive this process and the machine.

        Raises:
            ValueError: one of them is there already.
        """
        for row in rows:
            if _key(row) in self._rows:
                raise ValueError(f"{_key(row)} is in {self.path} already")
        kind = {cls: name for name, cls in _KINDS.items()}
        self._file.append(*({"kind": kind[type(row)], **asdict(row)} for row in rows))
        self._rows.update({_key(row): row for row in rows})

    def results(self) -> Results:
        """All rows."""
        rows = list(self._rows.values())
        return Results(
            [row for row in rows if isinstance(row, QuestionResult)],
            [row for row in rows if isinstance(row, PromptResult)],
            MeasureRows(
                [row for row in rows if isinstance(row, OwnText)],
                [row for row in rows if isinstance(row, OffContext)],
            ),
        )

    def remove(self) -> None:
        """Deletes the file: the results are elsewhere."""
        self.path.unlink()

    def _read(self) -> dict[Key, Row]:
        try:
            lines = [dict(line) for line in self._file.rows]
            rows = [_KINDS[line.pop("kind")](**line) for line in lines]
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.path} is not a journal of an evaluation ({error!r}); fix: delete it, or "
                "give another --out"
            ) from error
        return {_key(row): row for row in rows}

    def _set_aside(self, say: Callable[[str], None]) -> None:
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()[:8]
        aside = self.path.with_name(f"{self.path.stem}.{digest}.jsonl")
        self.path.replace(aside)
        say(f"it is set aside as {aside.name}; with its settings, and its name again, it goes on")
