"""Run ids of a run's folder: what earlier starts have published can be found, and deleted.

Each start publishes under an id of its own. It is noted before anything is published under it, so
the next start knows of every version that a start which died has left.
"""

from __future__ import annotations

from pathlib import Path

from cartridge_distill.sync.versions import is_run_id
from cartridge_distill.util.files import replace_file

RUNS_FILE = "runs.txt"


def record_start(run: Path, run_id: str) -> list[str]:
    """Notes a run id; those of earlier starts.

    What they have published is nobody's: a run that goes on takes a new id, see ``versions``.

    Args:
        run: the run's folder; made when it is not there.
    """
    file = run / RUNS_FILE
    earlier = file.read_text(errors="replace").splitlines() if file.is_file() else []
    known = [line for line in earlier if is_run_id(line) and line != run_id]
    run.mkdir(parents=True, exist_ok=True)
    lines = [*known, run_id]
    replace_file(file, lambda scratch: _write_lines(scratch, lines), overwrite=True)
    return known


def _write_lines(file: Path, lines: list[str]) -> None:
    file.write_text("".join(f"{line}\n" for line in lines))
