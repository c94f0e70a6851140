"""LongHealth's questions by generated answer: reasoning first, then the closest option.

A few defaults over `cartridge-distill eval`, whose options it takes: answers are generated, at
temperature 0.3 and up to 512 tokens, and each counts as the option closest to it, as the Cartridges
paper does on LongHealth (docs/evaluation.md has the protocol). With `--read-answers named` only an
option that the answer names counts. The scores by likelihood come with it.

    python training/prepare_data.py --data longhealth --patients patient_01 --tokenizer MODEL \\
        --out data/longhealth
    python training/eval_longhealth.py --model MODEL --data data/longhealth --cartridge DIR \\
        --dtype bfloat16 --batch 32 --out runs/mine/longhealth

On a machine without a GPU a server can generate: --server URL --served ID.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cartridge_distill.evaluation.command import main  # noqa: E402
from cartridge_distill.util.standard_output import guard_output  # noqa: E402

if __name__ == "__main__":
    guard_output()
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
    sys.exit(
        main(
            ["--generate", "--read-answers", "closest", *arguments],
            "python training/eval_longhealth.py",
        )
    )
