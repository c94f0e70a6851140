"""Which saved step of a run is the best: the one with the lowest validation KL.

``best.json`` lies beside the checkpoints and holds a step and its KL. Only a step that was saved
whole counts, for a number without its cartridge is of no use. A run without validations has no
such file, and its last step is taken.

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
    """A saved step, its validation KL in nats per token, and how many validations it was of."""

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
    file = checkpoints / BEST_FILE
    if not file.is_file():
        return None
    try:
        said = json_text.load(file)
        found = BestStep(int(said["step"]), float(said["kl"]), int(said["validations"]))
    except (json_text.JsonError, KeyError, TypeError, ValueError) as error:
        raise CartridgeFormatError(
            f"{file} is damaged ({error!r}); fix: delete it, and the last step is taken"
        ) from error
    if found.step > last or not is_whole(step_folder(checkpoints, found.step)):
        return None
    return found


def note_validation(checkpoints: Path, step: int, kl: float) -> BestStep | None:
    """Takes a validation down; the best step so far.

    A step that was not saved whole, and a KL that is no number, change nothing.
    """
    best = read_best(checkpoints, step)
    if not is_whole(step_folder(checkpoints, step)) or not math.isfinite(kl):
        return best
    if best is not None and best.step == step:
        return best  # a resumed run validates once more where it goes on
    count = 1 if best is None else best.validations + 1
    step, kl = (step, kl) if best is None or kl < best.kl else (best.step, best.kl)
    found = BestStep(step, kl, count)

    def write(file: Path) -> None:
        said = {"step": found.step, "kl": found.kl, "validations": found.validations}
        file.write_text(json.dumps(said) + "\n")

    replace_file(checkpoints / BEST_FILE, write, overwrite=True)
    return found
