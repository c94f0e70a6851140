"""What a run ended with: its last cartridge is there, and its best lies at RUN/cartridge.

The best is the saved step with the lowest validation KL. Where no validation ran, it is the last.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from cartridge_distill.cartridge.run_folder import CARTRIDGE_FOLDER, METRICS_FILE
from cartridge_distill.util.best_step import BestStep, read_best
from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.files import replace_directory
from cartridge_distill.util.next_command import shorter
from cartridge_distill.util.tracker import step_folder


@dataclass(frozen=True)
class Result:
    """A run's cartridge.

    Attributes:
        cartridge: RUN/cartridge.
        step: whose it is.
        last: step of the run.
        best: what the validations said; None where none ran on a saved step.
        untrained_kl: of the validation before the first step; None where there was none.
    """

    cartridge: Path
    step: int
    last: int
    best: BestStep | None
    untrained_kl: float | None = None

    def line(self) -> str:
        """For a person."""
        if self.best is None:
            why = "the last; no validation chose another"
        else:
            count = self.best.validations
            why = f"the lowest of {count} validations, KL {self.best.kl:.3f}"
            if self.untrained_kl is not None and self.untrained_kl <= self.best.kl:
                why += (
                    f"; before training it was {self.untrained_kl:.3f}, which is no higher: try "
                    "more --steps, or another --lr"
                )
        return f"{shorter(self.cartridge)} (step {self.step} of {self.last}: {why})"


def check_place(run: Path) -> None:
    """Can RUN/cartridge be written at the end? What is there must be a cartridge and nothing else.

    Raises:
        CartridgeFormatError: it holds what no command here wrote.
    """
    target = run / CARTRIDGE_FOLDER
    if not target.exists() and not target.is_symlink():
        return
    from cartridge_distill.cartridge.formats.detect import check_replaceable  # it imports torch

    try:
        check_replaceable(target)
    except CartridgeFormatError as error:
        what = str(error).partition("; fix: ")[0]  # another target is not to be had here
        raise CartridgeFormatError(
            f"the run's cartridge is to lie at {target}: {what}; fix: move it away, or give "
            "another --out"
        ) from None


def publish(run: Path, checkpoints: Path, last: int, choose_last: bool = False) -> Result:
    """Copies the best cartridge to RUN/cartridge, whole, in place of an earlier one.

    Args:
        run: the run's folder.
        checkpoints: its ``global_step_N``.
        last: the last step, which was saved.
        choose_last: take that one, whatever the validations say.

    Raises:
        CartridgeFormatError: something else lies there, or the checkpoint is damaged.
        DiskFull: there is no room for it.
    """
    from cartridge_distill.cartridge.checkpoint import read_meta, record  # it imports torch

    check_place(run)
    best = None if choose_last else read_best(checkpoints, last)
    step = last if best is None else best.step
    source = step_folder(checkpoints, step) / "actor" / CARTRIDGE_FOLDER
    read_meta(source)  # damage is named where it is
    chosen: dict[str, object] = {"step": step, "of": last, "by": "the last step"}
    if best is not None:
        chosen |= {
            "by": "the lowest validation KL",
            "kl": best.kl,
            "validations": best.validations,
        }

    def write(scratch: Path) -> None:
        for file in source.iterdir():
            shutil.copyfile(file, scratch / file.name)
        record(scratch, metrics={"chosen": chosen})

    target = run / CARTRIDGE_FOLDER
    replace_directory(target, write, overwrite=True)
    return Result(target, step, last, best, _untrained_kl(run))


def _untrained_kl(run: Path) -> float | None:
    """Validation KL before the first step, as the run's log has it."""
    try:
        lines = (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    rows = [json.loads(line) for line in lines if line.strip()]
    found = [row["data"].get("val/kl") for row in rows if row["step"] == 0]
    return float(found[0]) if found and found[0] is not None else None
