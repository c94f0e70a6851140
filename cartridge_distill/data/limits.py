"""How long a prompt and its answer may be, where nobody says otherwise.

One limit: what ``prepare`` writes, ``doctor`` looks at and the training takes is counted by the
rendering of :mod:`cartridge_distill.model.prompts`, see :mod:`.prompt_length`.

Without imports: ``--help`` of these commands needs the numbers and nothing else.
"""

from __future__ import annotations

PROMPT_TOKENS = 512
"""Of a prompt: ``--prompt-tokens``."""

RESPONSE_TOKENS = 256
"""Of an answer: ``--response-tokens``."""
