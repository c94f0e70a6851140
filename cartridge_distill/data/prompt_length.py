"""How many tokens a prompt has, counted as the training counts it.

The training renders a row's messages with :func:`cartridge_distill.model.prompts.render_prompt` and
refuses what is over its limit. Whoever writes rows or looks at them asks here, so that no row is
found to be too long by the training alone.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cartridge_distill.model.prompts import Message, render_prompt
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.lfs import about, pointer_in
from cartridge_distill.util.parquet import read_rows

_PREPARE = "write it with `cartridge-distill prepare`"
_SHOWN = 3


@dataclass(frozen=True)
class TooLong:
    """A row over the limit."""

    row: int
    tokens: int


def prompts_of(file: Path, column: str = "prompt") -> list[list[Message]]:
    """The conversations of a parquet file in veRL's schema.

    Raises:
        ConfigError: it cannot be read, or has no such column.
    """
    if pointer_in(file) is not None:
        raise ConfigError(about(file))
    try:
        rows = read_rows(file, [column])
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error}; fix: {_PREPARE}") from error
    if column not in rows.columns:
        raise ConfigError(f"{file} has no column {column!r}; fix: {_PREPARE}")
    return [[] if messages is None else list(messages) for messages in rows[column]]


class PromptLimit:
    """Looks which prompts are over a limit.

    Args:
        tokens: the limit, ``data.max_prompt_length`` of the training.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
        if tokens < 1:
            raise ConfigError(f"{tokens} tokens for a prompt are too few; fix: give 1 or more")
        self.tokens = tokens
        self._tokenizer = tokenizer
        self._around: dict[tuple[str, ...], int] = {}

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether a prompt is within the limit."""
        return self._at_most(messages) <= self.tokens or self.count(messages) <= self.tokens

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of a prompt, as the training renders it."""
        return len(render_prompt(self._tokenizer, list(messages)))

    def too_long(self, prompts: Iterable[Sequence[Message]]) -> list[TooLong]:
        """The rows over the limit, the longest first."""
        found = [
            TooLong(row, tokens)
            for row, messages in enumerate(prompts)
            if self._at_most(messages) > self.tokens
            and (tokens := self.count(messages)) > self.tokens
        ]
        return sorted(found, key=lambda row: -row.tokens)

    def check(self, prompts: Iterable[Sequence[Message]], what: str, fix: str) -> None:
        """Raises ConfigError when a row is over the limit.

        Args:
            what: the rows, for the message.
            fix: what to do about it; the number of tokens that would be enough is added.
        """
        if found := self.too_long(prompts):
            rows = ", ".join(f"row {one.row} has {one.tokens}" for one in found[:_SHOWN])
            more = ", ..." if len(found) > _SHOWN else ""
            raise ConfigError(
                f"{what}: {len(found)} prompts are over {self.tokens} tokens ({rows}{more}); "
                f"fix: {fix} {found[0].tokens}"
            )

    def _at_most(self, messages: Sequence[Message]) -> int:
        """A bound that needs no tokeniser: a token holds a byte of its text, at least."""
        roles = tuple(str(message["role"]) for message in messages)
        if roles not in self._around:
            self._around[roles] = self.count([{"role": role, "content": "a"} for role in roles])
        return self._around[roles] + sum(_bytes(str(m["content"])) for m in messages)


def _bytes(text: str) -> int:
    if text.isascii():
        return len(text)
    # A tokeniser that normalises the text first may make it longer.
    return max(len(form.encode()) for form in (text, unicodedata.normalize("NFKC", text)))
