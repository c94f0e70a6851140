"""Unpacks the parts of one delivery, on a node without network. Needs Python alone.

    python3 install.py --parts FOLDER --to FOLDER

Archives go to TO/project, TO/site and TO/overlay, pieces of files to TO/files. What an earlier
delivery brought is kept; the last line says whether everything is there. A part that is damaged is
named, and the status is 1.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

Part = dict[str, Any]


class DamagedPart(Exception):
    """A part, or a file made of parts, is not what was packed."""


def take(parts: Path, to: Path, part: Part) -> None:
    """Puts one part where it belongs, and notes that it is there."""
    data = (parts / part["name"]).read_bytes()
    if hashlib.sha256(data).hexdigest() != part["sha256"]:
        raise DamagedPart(f"{part['name']} is damaged; deliver it again")
    raw = gzip.decompress(data)
    folder = to / part["to"]
    folder.mkdir(parents=True, exist_ok=True)
    if part["kind"] == "archive":
        with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
            tar.extractall(folder, filter="data")
    else:
        # Pieces may come in any order, and from several processes at once.
        descriptor = os.open(folder / part["of"], os.O_WRONLY | os.O_CREAT, 0o644)
        os.pwrite(descriptor, raw, part["offset"])
        os.close(descriptor)
    note = to / "done" / part["name"]
    note.parent.mkdir(parents=True, exist_ok=True)
    note.touch()


def check_files(to: Path, parts: list[Part]) -> None:
    """Files that were cut must be whole again."""
    expected = {part["of"]: part["of_sha256"] for part in parts if part["kind"] == "piece"}
    for name, digest in expected.items():
        if hashlib.sha256((to / "files" / name).read_bytes()).hexdigest() != digest:
            raise DamagedPart(f"{name} is damaged; deliver all of its parts again")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=Path, required=True, help="folder of this delivery")
    parser.add_argument("--to", type=Path, required=True, help="where everything goes")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    parts: list[Part] = json.loads((options.parts / "parts.json").read_text())
    here = [part for part in parts if (options.parts / part["name"]).exists()]
    options.to.mkdir(parents=True, exist_ok=True)
    try:
        with ProcessPoolExecutor() as pool:
            jobs = [pool.submit(take, options.parts, options.to, part) for part in here]
            for job in jobs:
                job.result()
        done = options.to / "done"
        missing = [part["name"] for part in parts if not (done / part["name"]).exists()]
        if not missing:
            check_files(options.to, parts)
            (options.to / "complete").touch()
    except DamagedPart as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    said = f"still to come: {', '.join(missing)}" if missing else "everything is there"
    print(f"{len(here)} parts in {time.monotonic() - start:.1f} s; {said}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
