"""A run's log: one line a step while it lasts, and the causes when it failed."""

from __future__ import annotations

import re
from pathlib import Path

_SAID = "[cartridge] "
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Before a worker's line Ray writes "(TaskRunner pid=123) " or "(WorkerDict pid=1, ip=...) ".
_WORKER = re.compile(r"^\([^)]*pid=[^)]*\)\s*")
_ERROR = re.compile(r"(?:\w+\.)*\w+(?:Error|Unreachable|Refused|Died)\b.*: ?\S?")
_ONE_OF_SEVERAL = "- "  # our errors list what is wrong, a line each


def shown(line: str) -> str | None:
    """What is printed of a line of the log: what our own code says of the run, and nothing else."""
    return f"   {line.split(_SAID, 1)[1]}" if _SAID in line else None


def log_file(run: Path) -> Path:
    """``train.log`` of a new start; the logs of earlier starts become ``train.1.log`` and so on."""
    log = run / "train.log"
    if log.exists():
        number = 1
        while (run / f"train.{number}.log").exists():
            number += 1
        log.rename(run / f"train.{number}.log")
    return log


def causes(log: Path, most: int = 3) -> list[str]:
    """The last errors that the log names, each once, with what they list."""
    found: dict[str, list[str]] = {}
    listed: list[str] | None = None
    with log.open(errors="replace") as lines:
        for line in lines:
            text = _WORKER.sub("", _COLOUR.sub("", line)).strip()
            if _ERROR.match(text):
                listed = found.setdefault(text, []) if text.endswith(":") else None
                found.setdefault(text, [])
            elif listed is not None and text.startswith(_ONE_OF_SEVERAL):
                listed += [text] if text not in listed else []
            else:
                listed = None
    return ["\n  ".join([text, *items]) for text, items in found.items()][-most:]
