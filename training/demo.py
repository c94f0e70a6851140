"""The whole loop on a CPU or one GPU, ``make demo``: ``cartridge-distill demo``, from a checkout.

python training/demo.py --help
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cartridge_distill.util.standard_output import guard_output  # noqa: E402
from verl_patches.demo import main  # noqa: E402

if __name__ == "__main__":
    guard_output()
    sys.exit(main(None, "python training/demo.py"))
