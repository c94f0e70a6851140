"""How long a prompt and its answer may be, where nobody says otherwise.

One limit: what ``prepare`` writes, ``doctor`` looks at and the training takes is counted by the
rendering of :mod:`cartridge_distill.model.prompts`, see :mod:`.prompt_length`.
"""

from __future__ import annotations

PROMPT_TOKENS = 512
"""``data.max_prompt_length`` of the training."""

RESPONSE_TOKENS = 256
"""``data.max_response_length`` of the training."""
