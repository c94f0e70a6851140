"""``distill`` from Python, and the run that it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cartridge_distill.cartridge.run_folder import METRICS_FILE, resolve_cartridge
from cartridge_distill.util.errors import CartridgeDistillError, ConfigError
from cartridge_distill.util.extras import require

_MODULE = "verl_patches.distill"  # the core does not import what ties it to veRL
_EVALUATION = Path("evaluation") / "evaluation.json"


class DistillationFailed(CartridgeDistillError, RuntimeError):
    """The command ended with an error, which it has printed; ``status`` is its exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path

    @property
    def cartridge(self) -> Path:
        """Its best cartridge."""
        return Path(resolve_cartridge(self.folder))

    @property
    def report(self) -> Path:
        """One HTML file."""
        return self.folder / "report.html"

    def metrics(self) -> list[dict[str, Any]]:
        """What was logged of each step: its numbers by name, and ``step``."""
        lines = (self.folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
        return [{"step": row["step"], **row["data"]} for row in map(json.loads, lines)]

    def evaluation(self) -> dict[str, Any]:
        """What it is worth, as docs/evaluation.md describes ``evaluation.json``."""
        found: dict[str, Any] = json.loads((self.folder / _EVALUATION).read_text(encoding="utf-8"))
        return found


def distill(
    documents: str | Path,
    *,
    model: str,
    out: str | Path,
    overrides: Sequence[str] = (),
    **settings: Any,
) -> Run:
    """A cartridge of documents, as ``cartridge-distill distill`` makes it, its lines printed here.

    A run that was stopped goes on when it is called again with the same arguments; a finished one
    is returned as it is.

    Args:
        documents: a file, a folder, or records.
        model: folder or hub id of the base model.
        out: folder of the run.
        overrides: settings of veRL, ``name=value``.
        settings: the command's options, with underscores: ``tokens=128``, ``steps=36``,
            ``questions="questions.csv"``, ``device="cuda"``; True for a switch.

    Raises:
        ConfigError: a setting that is no option's value.
        DistillationFailed: the command ended with an error, or refused the settings.
        ExtraMissing: what it needs is not installed.
    """
    require("distill")
    command = [sys.executable, "-m", _MODULE, str(documents), "--model", str(model)]
    command += ["--out", str(out), *_options(settings), *overrides]
    status = subprocess.call(command)
    if status != 0:
        raise DistillationFailed(
            f"the distillation of {documents} ended with status {status}; its last lines say why, "
            f"and {out}/*.log have the rest",
            status,
        )
    return Run(Path(out).expanduser().absolute())


def _options(settings: dict[str, Any]) -> list[str]:
    found = []
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            found.append(option)
        elif value is None or value is False:
            continue
        elif isinstance(value, str | int | float | Path):
            found += [option, str(value)]
        else:
            raise ConfigError(f"{name}={value!r} is no option; fix: give a number, a text or True")
    return found
