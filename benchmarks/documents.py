"""What `prepare` makes of real documents: characters, usable share, words, seconds, warnings.

    python benchmarks/documents.py FOLDER
    python benchmarks/documents.py FOLDER --show 'manual.pdf'    # the text that was read of one

One row a file, in Markdown. Nothing is written. A file that is refused has the reason in its row.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from cartridge_distill.data.documents.reading import KINDS, read_file  # noqa: E402
from cartridge_distill.data.documents.usable import usable  # noqa: E402
from cartridge_distill.util.errors import DocumentError  # noqa: E402

HEAD = "| document | characters | usable | letters a word | seconds | what is said |"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="documents: .txt, .md, .rst, .html, .pdf")
    parser.add_argument("--show", metavar="NAME", help="print the text that was read of this file")
    return parser.parse_args(arguments)


def row(file: Path, name: str) -> str:
    """The line of the table about one file."""
    begin = time.perf_counter()
    try:
        read = read_file(file, name)
        found = usable(read.text, read.form)
    except DocumentError as error:
        said = str(error).replace(str(file), "it").replace("|", "/")
        return f"| {name} | | refused | | {time.perf_counter() - begin:.1f} | {said} |"
    seconds = time.perf_counter() - begin
    length = f"{found.word_length:.1f}" if found.word_length else "-"
    said = "; ".join([*found.warnings(), *read.notes]).replace("|", "/")
    return (
        f"| {name} | {found.characters:,} | {100 * found.share:.0f} % | {length} | {seconds:.1f} | "
        f"{said} |"
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    files = sorted(f for f in options.folder.rglob("*") if f.suffix.lower() in KINDS)
    if not files:
        print(f"error: {options.folder} has no {', '.join(KINDS)} file in it", file=sys.stderr)
        return 1
    if options.show:
        print(read_file(options.folder / options.show).text)
        return 0
    print(f"{HEAD}\n|---|---:|---:|---:|---:|---|")
    for file in files:
        print(row(file, file.relative_to(options.folder).as_posix()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
