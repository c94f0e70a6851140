"""How large the parts of a request may be, on every server of this project.

These are bounds of a schema: above them no model and no setting makes sense of a request, and below
them a request costs little before it is looked at. What a server serves (its context, its choices)
is narrower and refused by the server. Lower bounds that a server refuses in words of its own
(``n=0``) are left to it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

MAX_TEXT_CHARS = 2**22
"""A prompt, or a message, as text."""
MAX_PROMPT_TOKENS = 2**20
MAX_PROMPTS = 256
"""Prompts in a list, which is refused later and in words."""
MAX_MESSAGES = 2048
MAX_TEXT_PARTS = 64
MAX_CHOICES = 256
"""``n``: answers to one prompt."""
MAX_STOPS, MAX_STOP_CHARS = 16, 256
MAX_CARTRIDGES = 16
"""Cartridges that one request joins."""
MAX_NAME_CHARS = 4096
"""A model's or a cartridge's name; names of models may be paths."""
MAX_SHORT_CHARS = 512
MAX_METADATA = 64
MAX_LOGIT_BIASES = 1024

Whole = Annotated[int, Field(ge=-(2**31), lt=2**31)]
"""A count of tokens, a number of log-probs."""
Choices = Annotated[int, Field(ge=-(2**31), le=MAX_CHOICES)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Real = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=-1e3, le=1e3, allow_inf_nan=False)]
TokenIds = Annotated[list[Whole], Field(max_length=MAX_PROMPT_TOKENS, fail_fast=True)]
LongText = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
ShortText = Annotated[str, Field(max_length=MAX_SHORT_CHARS)]
Name = Annotated[str, Field(max_length=MAX_NAME_CHARS)]
Stop = Annotated[str, Field(max_length=MAX_STOP_CHARS)]
