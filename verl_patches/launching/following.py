"""A run's log: one line a step while it lasts, and the causes when it failed.

All of it is in the file. A person sees one line a step, with the time left, and of the rest what is
worth a look, once.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

_SAID = "[cartridge] "
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Before a worker's line Ray writes "(TaskRunner pid=123) " or "(WorkerDict pid=1, ip=...) ".
_WORKER = re.compile(r"^\([^)]*pid=[^)]*\)\s*")
_ERROR = re.compile(
    r"(?:\w+\.)*(?:\w+(?:Error|Unreachable|Refused|Died)|OtherSettings|DiskFull)\b.*: ?\S?"
)
_ONE_OF_SEVERAL = "- "  # our errors list what is wrong, a line each
_STEP = re.compile(r"step (\d+)/(\d+)  ")
_VALIDATION = re.compile(r"validation at step (\d+)/\d+  (.*?)(?:  [\d.]+s)?$")
_RESUMED = re.compile(r"resumed from .*, step (\d+) of \d+")
STARTED = "the server has the version to start from"
"""What the trainer says when nothing was refused: the next is its first step."""
_OF_EVERY_RUN = ("the trainer is up; ", "model loaded; ", STARTED, "version ")


class StepLines:
    """One line a step: the losses, a validation of the same step, and the time left.

    Called with each line of the log; returns what is printed of it.

    Args:
        verbose: everything is printed as it is.
        started: called once, when the trainer says that it has begun.
        now: the clock, in seconds.
    """

    def __init__(
        self,
        verbose: bool = False,
        started: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._verbose, self._started, self._now = verbose, started, now
        self._has_started = False
        self._stands_at = 0
        self._once: set[str] = set()
        self._validation: tuple[int, str] | None = None
        self._last: float | None = None
        self._seconds: list[float] = []

    def __call__(self, line: str) -> str | None:
        if _SAID not in line:
            return line if self._verbose else None
        said = line.split(_SAID, 1)[1].rstrip()
        if not self._has_started and (said.startswith(STARTED) or _STEP.match(said)):
            self._has_started = True
            self._started()
        text = self._text(said)
        return line if self._verbose else text

    def _text(self, said: str) -> str | None:
        if match := _VALIDATION.match(said):
            step, scores = int(match[1]), match[2]
            if step == self._stands_at:  # before the first step: no line of a step will carry it
                self._last = self._now()
                return f"   before step {step + 1}: {scores}"
            self._validation = (step, scores)
            return None
        if match := _STEP.match(said):
            return f"   {said}{self._of_validation(int(match[1]))}{self._left(match)}"
        if said.startswith(_OF_EVERY_RUN) or said in self._once:
            if said.startswith(STARTED):
                self._last = self._now()
            return None
        self._once.add(said)
        if match := _RESUMED.match(said):
            self._stands_at = int(match[1])
        return f"   {said}"

    def _of_validation(self, step: int) -> str:
        if self._validation is None or self._validation[0] != step:
            return ""
        return f"  held out: {self._validation[1]}"

    def _left(self, match: re.Match[str]) -> str:
        """The time that the steps to come take, as the ones before took theirs."""
        now, steps = self._now(), int(match[2]) - int(match[1])
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now
        if not steps or not self._seconds:
            return ""
        # The mean has the steps with a validation in it; the first step compiles, and is left out.
        recent = self._seconds[1:][-20:] or self._seconds
        return f"  {duration(statistics.mean(recent) * steps)} left"


def duration(seconds: float) -> str:
    """``40 s``, ``3 min``, ``2.5 h``: as exact as an estimate deserves."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def log_file(run: Path, name: str = "train") -> Path:
    """``train.log`` of a new start; the logs of earlier starts become ``train.1.log`` and so on."""
    log = run / f"{name}.log"
    if log.exists():
        number = 1
        while (run / f"{name}.{number}.log").exists():
            number += 1
        log.rename(run / f"{name}.{number}.log")
    return log


def causes(log: Path, most: int = 3) -> list[str]:
    """The last errors that the log names, each once, with what they list."""
    found: dict[str, list[str]] = {}
    listed: list[str] | None = None
    with log.open(errors="replace") as lines:
        for line in lines:
            text = _WORKER.sub("", _COLOUR.sub("", line)).strip()
            if _ERROR.match(text):
                listed = found.setdefault(text, [])
            elif listed is not None and text.startswith(_ONE_OF_SEVERAL):
                listed += [text] if text not in listed else []
            else:
                listed = None
    return ["\n  ".join([text, *items]) for text, items in found.items()][-most:]
