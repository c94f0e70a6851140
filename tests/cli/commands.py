"""The commands of ``cartridge-distill``, for every test that goes through all of them.

``PASSED_ON`` has those that another program takes over, each with an option of its help.
"""

from __future__ import annotations

COMMANDS = (
    *"doctor distill prepare train demo init info".split(),
    *"eval chat report convert compose push pull serve".split(),
)
PASSED_ON = {
    "eval": "--untrained",
    "chat": "--start",
    "train": "--response-tokens",
    "prepare": "--recipe",
    "demo": "--prompts",
    "distill": "--response-tokens",
}
