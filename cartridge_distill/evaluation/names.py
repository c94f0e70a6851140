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

OWN_TEXT, OFF_CONTEXT = "own_text", "off_context"
MEASURES = (OWN_TEXT, OFF_CONTEXT)
"""Groups of measures that ``--measures`` switches on."""

MEASURE_TOKENS = 256
"""Tokens of a text that a condition writes itself, at most."""

ROLLOUT_TEMPERATURE = 0.7
"""Of the training's rollouts, where the cartridge does not say at which it was trained."""

OFF_CONTEXT_TOKENS = 32
"""Tokens of the bare model's answer to an unrelated prompt, at most."""

ANSWER_TOKENS = 12
"""Tokens of the teacher's answer on which the KL is taken, at most."""

NAMED, CLOSEST = "named", "closest"
"""How a generated answer becomes an option: the one that it names, or always the closest text."""

TEMPERATURE = 0.3
MAX_NEW_TOKENS = 512
"""Of generated answers, as the Cartridges paper asks LongHealth."""

SHADE_TOKENS = 2000
"""Tokens of a document whose divergence the report shows one by one, at most."""
