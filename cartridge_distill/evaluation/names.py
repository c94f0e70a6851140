"""Names of the table's lines, and the command's defaults.

Here and without imports, because the report and ``--help`` need them and no model.
"""

from __future__ import annotations

NO_DOCUMENT = "no document"
BEST_CHUNK = "best chunk"
UNTRAINED = "untrained cartridge"
TRAINED = "trained cartridge"
FULL_DOCUMENT = "full document"
CONDITIONS = (NO_DOCUMENT, BEST_CHUNK, UNTRAINED, TRAINED, FULL_DOCUMENT)

ANSWER_TOKENS = 12
"""Tokens of the teacher's answer on which the KL is taken, at most."""

NAMED, CLOSEST = "named", "closest"
"""How a generated answer becomes an option: the one that it names, or always the closest text."""

TEMPERATURE = 0.3
MAX_NEW_TOKENS = 512
"""Of generated answers, as the Cartridges paper asks LongHealth."""
