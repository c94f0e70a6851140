"""What every saved step was: ``history.jsonl`` in the run's folder, one line a step.

veRL logs a step's numbers after it saved the step, and its file logger begins an empty file at
every start. A run that is killed in between and goes on would have a step that no log knows, and
a resumed one none of the steps before. So the numbers are saved with the step itself, and those of
a resumed run begin where it goes on: every step is there once, as it was trained.

The file is written as a whole, like the checkpoint's other parts, before the tracker that makes
the checkpoint count; lines beyond the tracker's step are of a save that was killed. Each line holds
a hash of itself (``entries_sha256``): a number that was changed on the disk is refused.
"""

from __future__ import annotations

import json
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.files import replace_file
from cartridge_distill.util.sealed import is_sealed, sealed, unsealed
from cartridge_distill.util.tracker import HISTORY_FILE

__all__ = ["HISTORY_FILE", "History"]


class History:
    """Lines ``{"step", "version", "data"}``: the step's number, the cartridge version that wrote
    its rollouts, and its metrics, which are plain numbers.

    Attributes:
        lines: of all steps so far, in order.
    """

    def __init__(self, lines: list[dict[str, Any]] | None = None) -> None:
        self.lines = lines or []

    @classmethod
    def read(cls, run: Path, step: int) -> History:
        """The lines up to a saved step. A folder of a run that kept no history has none.

        Raises:
            CartridgeFormatError: a line is damaged.
        """
        file = run / HISTORY_FILE
        if not file.is_file():
            return cls()
        try:
            found = [dict(json.loads(line)) for line in file.read_text().splitlines()]
            if len(set(map(is_sealed, found))) > 1:
                raise ValueError("some of its lines have a hash, and some have none")
            lines = [unsealed(line) for line in found]
            return cls([line for line in lines if line["step"] <= step])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CartridgeFormatError(
                f"{file} is damaged ({error!r}); the checkpoints do not depend on it; fix: move it "
                "away, and the run goes on without the numbers of the steps before"
            ) from error

    def add(self, step: int, version: str, metrics: Mapping[str, Any]) -> None:
        """A step that was trained."""
        plain = {k: v for k, v in metrics.items() if isinstance(v, numbers.Real)}
        data = {k: v if isinstance(v, int) else float(v) for k, v in plain.items()}
        self.lines.append({"step": step, "version": version, "data": data})

    def with_logged(self, log: Path, step: int) -> list[dict[str, Any]]:
        """The lines up to ``step`` that a log of the run should hold, each step once.

        Args:
            log: veRL's, of the starts before. Its own lines are kept; where it missed a step that
                was saved, there is the history's.
        """
        found: dict[int, dict[str, Any]] = {line["step"]: dict(line["data"]) for line in self.lines}
        for text in log.read_text().splitlines() if log.is_file() else []:
            line = _json_or_none(text)
            if line is not None:  # a step may have several: validation has one of its own
                found.setdefault(line["step"], {}).update(line["data"])
        return [{"step": n, "data": found[n]} for n in sorted(found) if n <= step]

    def write(self, run: Path) -> None:
        """All lines, in place of those that were there."""

        def write(file: Path) -> None:
            file.write_text("".join(json.dumps(sealed(line)) + "\n" for line in self.lines))

        replace_file(run / HISTORY_FILE, write, overwrite=True)


def _json_or_none(line: str) -> Any:
    """A line of a log; None for half a one, the last words of a killed run."""
    try:
        return json.loads(line)
    except ValueError:
        return None
