"""Recipes side by side on documents of one's own: arms x seeds x documents of a grid file.

    python -m training.study training/study/grids/demo_record.yaml --out runs/study

The grid is committed before it runs; a draft says so in its table. The study refuses to compare
where the full document does not beat no document by 20 points of generated_match. Stopped or
killed, the same command goes on: run by run, and inside a run from its last save. Given twice, the
two processes share the runs. It ends in OUT/table.md and a report for each document.
docs/results.md has the studies that were done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cartridge_distill.util.clean_logs import hide_secrets_in_logs
from cartridge_distill.util.command_line import Parser
from cartridge_distill.util.errors import CartridgeDistillError
from cartridge_distill.util.standard_output import guard_output

PROGRAM = "python -m training.study"
REFUSED = 3
"""Exit status where the gate failed."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = Parser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit status: 0 done; 1 refused or failed; 3 the gate failed; 130 Ctrl-C",
    )
    option = parser.add_argument
    option("grid", type=Path, help="YAML, see training/study/grid.py")
    option("--out", type=Path, required=True, help="folder of the study")
    option("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    option(
        "--draft", action="store_true", help="run a grid that is not committed; the table says so"
    )
    option("--gate-only", action="store_true", help="measure the gate of every document, and end")
    option("--table-only", action="store_true", help="print the tables of the runs that are done")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    typed = list(sys.argv[1:] if arguments is None else arguments)
    hide_secrets_in_logs()
    from training.study.gate import GateFailed
    from training.study.grid import read_grid, registered

    try:
        grid = read_grid(options.grid)
        registration = registered(options.grid, options.draft or options.gate_only)
        if options.table_only:
            from training.study.table import tables

            print(tables(grid, registration, options.out), end="")
            return 0
        from training.study.running import Study, limit_threads
        from training.study.turns import alone

        limit_threads(options.threads)
        study = Study(grid, registration, options.out, [*PROGRAM.split(), *typed])
        if options.gate_only:
            study.gates(check=False)
            return 0
        study.run()
        with alone(study.lock("study")):
            finish(study)
    except GateFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except (CartridgeDistillError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def finish(study: object) -> None:
    """Writes and prints the tables, and the report."""
    from cartridge_distill.report.page import write_report
    from training.study.running import Study, place_of
    from training.study.table import tables

    assert isinstance(study, Study)
    grid, out = study.grid, study.out
    text = tables(grid, study.registration, out)
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text, end="")
    for document in grid.documents:
        runs = [place_of(out, document, arm, s).folder for arm in grid.arms for s in grid.seeds]
        report = write_report(runs, out / document / "report.html")
        print(f"report: {report}")


if __name__ == "__main__":
    guard_output()
    sys.exit(main())
