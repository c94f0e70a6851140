"""Which saved step of a run is the best: the one with the lowest validation KL.

``best.json`` lies beside the checkpoints and holds the KL of each validated step that was saved. A
number without its cartridge is of no use, so a step whose checkpoint is not whole does not count. A
run without validations has no such file, and its last step is taken.

The trainer writes it, the launcher reads it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from cartridge_distill.util import json_text
from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.files import replace_file
from cartridge_distill.util.tracker import is_whole, step_folder

BEST_FILE = "best.json"


@dataclass(frozen=True)
class BestStep:
    """A saved step, its validation KL in nats per token, and of how many validations."""

    step: int
    kl: float
    validations: int = 1


def read_best(checkpoints: Path, last: int) -> BestStep | None:
    """The best step up to ``last``; None where no saved step was validated.

    Args:
        checkpoints: the folder with ``global_step_N``.
        last: steps beyond it are of a timeline that was left.

    Raises:
        CartridgeFormatError: the file is damaged.
    """
    found = {step: kl for step, kl in _read(checkpoints).items() if step <= last}
    there = [step for step in found if is_whole(step_folder(checkpoints, step))]
    if not there:
        return None
    best = min(there, key=lambda step: (found[step], step))
    return BestStep(best, found[best], len(found))


def note_validation(checkpoints: Path, step: int, kl: float) -> None:
    """Takes a validation down; not that of a step without a whole checkpoint, or without a number.

    What was noted of later steps is of a timeline that was left, and goes.
    """
    if not is_whole(step_folder(checkpoints, step)) or not math.isfinite(kl):
        return
    found = {n: value for n, value in _read(checkpoints).items() if n < step} | {step: kl}

    def write(file: Path) -> None:
        file.write_text(json.dumps({"kl": found}) + "\n")

    replace_file(checkpoints / BEST_FILE, write, overwrite=True)


def _read(checkpoints: Path) -> dict[int, float]:
    file = checkpoints / BEST_FILE
    if not file.is_file():
        return {}
    try:
        return {int(step): float(kl) for step, kl in json_text.load(file)["kl"].items()}
    except (json_text.JsonError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CartridgeFormatError(
            f"{file} is damaged ({error!r}); fix: delete it, and the last step is taken"
        ) from error
