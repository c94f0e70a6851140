"""What a soak's answers must be: one per request, and made by the cartridge that was asked for.

The log-probs of every answer are computed again by transformers' own forward, with the version's
cartridge in its cache, and compared; then once more with the version before it, from which they
must be far. So an answer of another version, of another request, or of no cartridge is found.
"""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cartridge_distill.gateway.store import RETRY_SECONDS
from cartridge_distill.rollout import http as retrying
from tests.tiny import random_cartridge

TOLERANCE = 1e-4
"""Between the server's and the recomputed log-probs, in float32."""
FAR = 10 * TOLERANCE
"""Log-probs of another cartridge differ by more, in one token of the answer at least."""
_ROWS = 256
# A killed server is known to be dead within a moment; on a busy machine the client hears later.
_EXPLAINED_SECONDS = 5.0


@dataclass(frozen=True)
class Answer:
    """One answer: request ``number`` asked for version ``step``."""

    number: int
    step: int
    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]

    @property
    def fingerprint(self) -> bytes:
        """The answer's bytes; two requests with different prompts never share them."""
        tokens = np.asarray(self.token_ids, np.int32)
        return tokens.tobytes() + np.asarray(self.logprobs, np.float32).tobytes()


@dataclass
class Differences:
    """Largest difference of log-probs within an answer, over all answers checked.

    Attributes:
        own: the largest one, with the version asked for.
        others: with the version before it, one per answer.
    """

    own: float = 0.0
    others: list[float] = field(default_factory=list)


class Checker:
    """Recomputes answers.

    Args:
        model: the served one, a copy of its own.
        cartridge_tokens: of every version.
        seed_of: the seed of a version's cartridge, from its step.
        new_tokens: that every answer must have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cartridge_tokens: int,
        seed_of: Callable[[int], int],
        new_tokens: int,
    ) -> None:
        self._model = model
        self._tokens = cartridge_tokens
        self._seed_of = seed_of
        self._new_tokens = new_tokens
        self.differences = Differences()

    def check(
        self, answers: Sequence[Answer], progress: Callable[[int], None] = lambda _: None
    ) -> list[str]:
        """The violations among these answers, in words.

        Args:
            progress: called with the number of answers checked so far.
        """
        violations = [*doubled(answers)]
        whole = []
        for answer in answers:
            if len(answer.token_ids) == len(answer.logprobs) == self._new_tokens:
                whole.append(answer)
            else:
                violations.append(
                    f"request {answer.number} got {len(answer.token_ids)} tokens, asked for "
                    f"{self._new_tokens}"
                )
        done = 0
        whole.sort(key=lambda answer: (answer.step, len(answer.prompt_ids)))
        for (step, _), group in itertools.groupby(
            whole, key=lambda answer: (answer.step, len(answer.prompt_ids))
        ):
            for some in _batches(list(group)):
                violations += self._check_version(step, some)
                done += len(some)
                progress(done)
        return violations

    def _check_version(self, step: int, answers: list[Answer]) -> list[str]:
        given = torch.tensor([answer.logprobs for answer in answers], dtype=torch.float32)
        other = step - 1 if step else 1
        own = (given - self.logprobs(step, answers)).abs().amax(1)
        far = (given - self.logprobs(other, answers)).abs().amax(1)
        self.differences.own = max(self.differences.own, float(own.max()))
        self.differences.others += far.tolist()
        found = []
        for answer, mine, others in zip(answers, own.tolist(), far.tolist(), strict=True):
            if not mine <= TOLERANCE:
                near = f"; they are those of version {other}" if others <= TOLERANCE else ""
                found.append(
                    f"request {answer.number} asked for version {step}; its log-probs differ by "
                    f"{mine:.2g} from that version's{near}"
                )
            elif not others > FAR:
                found.append(
                    f"request {answer.number} asked for version {step}; its log-probs are within "
                    f"{others:.2g} of version {other}, too"
                )
        return found

    @torch.no_grad()
    def logprobs(self, step: int, answers: Sequence[Answer]) -> Tensor:
        """Log-probs ``[B, n]`` of the answers' tokens behind the cartridge of ``step``; all
        prompts of one length."""
        prefix = random_cartridge(self._model, self._tokens, self._seed_of(step)).prefix()
        cache, rows = DynamicCache(), len(answers)
        for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            cache.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), layer)
        ids = torch.tensor([answer.prompt_ids + answer.token_ids for answer in answers])
        positions = torch.arange(self._tokens, self._tokens + ids.shape[1])[None]
        logits = self._model(
            input_ids=ids, position_ids=positions.expand(len(ids), -1), past_key_values=cache
        ).logits
        predicted = logits[:, -1 - self._new_tokens : -1].float().log_softmax(-1)
        new = ids[:, -self._new_tokens :]
        return predicted.gather(2, new[..., None])[..., 0]


def doubled(answers: Sequence[Answer]) -> list[str]:
    """Requests with more than one answer, and answers that two requests were given."""
    found, numbers = [], set()
    first: dict[bytes, int] = {}
    for answer in answers:
        if answer.number in numbers:
            found.append(f"request {answer.number} was answered twice")
        elif answer.fingerprint in first:
            found.append(
                f"requests {first[answer.fingerprint]} and {answer.number} got the same answer"
            )
        numbers.add(answer.number)
        first.setdefault(answer.fingerprint, answer.number)
    return found


def _batches(answers: list[Answer]) -> list[list[Answer]]:
    return [answers[start : start + _ROWS] for start in range(0, len(answers), _ROWS)]


class RetryLog(logging.Handler):
    """Collects what the client says when it tries again: when, and why."""

    def __init__(self) -> None:
        super().__init__()
        self.attempts: list[tuple[float, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"failed \((.*)\); the next in", record.getMessage(), re.DOTALL)
        reason = found[1] if found else record.getMessage()
        self.attempts.append((time.monotonic(), re.sub(r"'[^']*'", "'...'", reason)))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the soak runs, and nothing of it on the terminal."""
        retrying.logger.addHandler(self)
        retrying.logger.propagate = False
        try:
            yield
        finally:
            retrying.logger.propagate = True
            retrying.logger.removeHandler(self)


def unexplained(attempts: Sequence[tuple[float, str]], kills: Sequence[float]) -> list[str]:
    """Failed attempts other than HTTP 503 within a moment of a kill."""
    return [
        f"an attempt failed {since_kill(when, kills):.1f} s after a kill: {reason}"
        for when, reason in attempts
        if not reason.startswith("HTTP 503") or since_kill(when, kills) > _EXPLAINED_SECONDS
    ]


def since_kill(when: float, kills: Sequence[float]) -> float:
    """Seconds since the last kill before that; infinite when there was none."""
    return min((when - kill for kill in kills if kill <= when), default=float("inf"))


class DiskWatch:
    """Which versions may lie on the disk.

    The gateway deletes when a version arrives. So one beyond the newest ``keep`` may be there when
    it is in use, or was when the last one arrived. A version of which a request failed stays for
    :data:`~cartridge_distill.gateway.store.RETRY_SECONDS`; that is any request that was under way
    when the server was killed.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._users: Counter[int] = Counter()
        self._free_from: dict[int, float] = {}
        self._last_kill = float("-inf")
        self._arrived: list[int] = []
        self._last_began = 0.0
        self.most_versions = 0
        self.most_bytes = 0

    @contextmanager
    def using(self, step: int) -> Iterator[None]:
        """Around a request."""
        self._users[step] += 1
        began = time.monotonic()
        try:
            yield
        finally:
            self._users[step] -= 1
            failed = self._last_kill >= began - _EXPLAINED_SECONDS
            free_from = time.monotonic() + (RETRY_SECONDS if failed else 0.0)
            self._free_from[step] = max(free_from, self._free_from.get(step, 0.0))

    @property
    def in_flight(self) -> int:
        """Requests, whatever their version."""
        return self._users.total()

    def killed(self) -> None:
        """The server, just now."""
        self._last_kill = time.monotonic()

    def arrived(self, step: int, began: float) -> None:
        """An upload that began then is done."""
        self._arrived.append(step)
        self._last_began = began

    def sample(self, steps: Sequence[int], num_bytes: int) -> list[str]:
        """Violations among the versions on disk."""
        self.most_versions = max(self.most_versions, len(steps))
        self.most_bytes = max(self.most_bytes, num_bytes)
        if len(self._arrived) < self._keep:
            return []
        oldest = self._arrived[-self._keep]
        return [
            f"version {step} is on the disk, unused, while the newest {self._keep} begin at "
            f"{oldest}"
            for step in steps
            if step < oldest
            and not self._users[step]
            and self._free_from.get(step, 0.0) < self._last_began
        ]
