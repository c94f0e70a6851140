"""Which decoders of the installed transformers take a cartridge: a table, one row each.

    python benchmarks/architectures.py              # all, a few minutes
    python benchmarks/architectures.py llama gemma4_text

Each is built tiny with random weights and loaded as any model is. What loading accepts is compared
once more, with longer sequences than loading takes. ``exact``: packed and behind a prefix the
logits are those of the model's own eager attention. ``refused``: loading says what is not
supported. ``wrong`` and ``failed`` are faults of this project; either ends the script with 1.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.architectures import NAMES, VARIANTS, examine  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="of transformers' decoders; all by default")
    names = parser.parse_args(arguments).names or [*NAMES, *VARIANTS]
    logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| decoder | verdict | why, or how far off |\n|---|---|---|")
    counted: Counter[str] = Counter()
    for name in names:
        found = examine(name)
        counted[found.verdict] += 1
        why = found.why.replace("|", "\\|")
        print(f"| {name} | {found.verdict} | {why} |", flush=True)
    print("\n" + ", ".join(f"{count} {verdict}" for verdict, count in counted.most_common()))
    return 1 if counted["wrong"] or counted["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
