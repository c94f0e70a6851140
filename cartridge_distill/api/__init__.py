"""From Python: distil a document into a cartridge, load it, ask it.

>>> from cartridge_distill.api import distill, load
>>> run = distill("handbook/", model="MODEL", out="runs/mine")
>>> anna = load(run.folder)
>>> anna.generate("Who opened the harbour?").text

``running``  :func:`distill`, and what a :class:`Run` left behind
``asking``   :func:`load`, and a :class:`Loaded` cartridge that answers

What is a command, too, is done by the command's own code: ``cartridge-distill distill`` in a
process of its own, because it starts Ray; ``cartridge-distill chat`` in this one.
"""

from __future__ import annotations

from cartridge_distill.api.asking import Loaded, load
from cartridge_distill.api.running import DistillationFailed, Run, distill
from cartridge_distill.cli.conversation import Reply

__all__ = ["DistillationFailed", "Loaded", "Reply", "Run", "distill", "load"]
