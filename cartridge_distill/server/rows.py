"""What the engine works on: a sequence to continue, and what comes of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.util.errors import CartridgeDistillError


class EngineError(CartridgeDistillError):
    """A row could not be computed. ``retryable``: the same request may work later."""

    def __init__(self, message: str, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


@dataclass(frozen=True)
class NewToken:
    """A token that a row was continued with.

    Attributes:
        id: of the token.
        logprob: natural log of the probability it was chosen with, see ``sampling``.
        likeliest: (id, log-prob) of the ``top_logprobs`` likeliest tokens in its place, the
            likeliest first.
    """

    id: int
    logprob: float
    likeliest: list[tuple[int, float]]


@dataclass(eq=False)
class Row:
    """One sequence to continue.

    Attributes:
        prompt_ids: at least one id; they follow the prefix, at positions P, P + 1, ...
        max_new_tokens: at least 1.
        temperature: 0 is greedy.
        generator: the row's own random numbers.
        prefix: P tokens before the prompt, on the model's device, or None. Rows that share a prefix
            must hold the same object.
        end_ids: ids that end the row.
        ends_with_stop: called with all new ids after each token; true ends the row.
        on_token: called with each new token, in the engine's thread, before the row can end.
        top_logprobs: how many of the likeliest tokens in each place ``on_token`` is told.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    temperature: float
    generator: random.Random
    prefix: Prefix | None = None
    end_ids: frozenset[int] = frozenset()
    ends_with_stop: Callable[[list[int]], bool] | None = None
    on_token: Callable[[NewToken], None] | None = None
    top_logprobs: int = 0
    future: Future[Completion] = field(default_factory=Future)
    done: int = 0  # tokens whose keys and values lie in the buffers
    shared: int = 0
    sought: bool = False  # whether a kept beginning was looked for
    new_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def need(self) -> int:
        """Buffer tokens the row may come to need; the last new token is never fed back."""
        return len(self.prompt_ids) + self.max_new_tokens - 1

    @property
    def pending(self) -> int:
        """Tokens known and not yet computed: the rest of the prompt, or the last new token."""
        return len(self.prompt_ids) + len(self.new_ids) - self.done

    def tokens(self, start: int, length: int) -> list[int]:
        prompt = len(self.prompt_ids)
        if start >= prompt:
            return self.new_ids[start - prompt : start - prompt + length]
        return self.prompt_ids[start : start + length]
