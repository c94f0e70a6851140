"""Talk to a model that has a cartridge instead of the document.

    cartridge-distill chat --model MODEL --cartridge CARTRIDGE
    cartridge-distill chat --model MODEL --cartridge CARTRIDGE --prompt "Where ...?"

Tokens are shown as they come. Without --cartridge the bare model answers, for comparison.
"""

# Only the command line is here: --help needs none of the imports of `conversation`.

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cartridge_distill.util.errors import CartridgeDistillError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="cartridge-distill chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--model", required=True, help="folder or hub id of the model the cartridge is for")
    option("--cartridge", help="directory, .pt file or repo id; without it the bare model answers")
    option("--document", type=Path, help="its text: say how many KV tokens it would have taken")
    option("--prompt", help="ask this and end; without it, a conversation (Ctrl-D ends it)")
    option(
        "--start", help="with --prompt: the beginning of the answer, for the model to go on from"
    )
    option("--max-new-tokens", type=int, default=128, help="longest answer (%(default)s)")
    option("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    option("--dtype", default="auto", help="dtype of the model (%(default)s: as saved)")
    options = parser.parse_args(arguments)
    try:
        from cartridge_distill.cli.conversation import converse

        converse(options)
    except (CartridgeDistillError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (EOFError, KeyboardInterrupt):
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
