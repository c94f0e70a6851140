"""Choosing tokens: a function of the server's seed and the request, not of what else is in flight.

**Which log-probs are reported.** As on the real server (read in its ``calc_tokens_and_logprobs``):
the log of the probability a token was *sampled with*, that is of ``softmax(logits / temperature)``
in float32; for greedy requests (temperature 0) of ``softmax(logits)``. A trainer that compares
log-probs must divide its logits by the temperature too.

**Repeatability.** Each choice draws its random numbers from a generator of its own, seeded with
(server seed, prompt ids, cartridge ids, index of the choice, how often this very request came
before). Of a version's id only the step counts: every start of a run has an id of its own, and the
same run, started again or gone on with, must draw the same. Arrival order and batching do not
enter, except that floating-point sums of a differently composed batch differ by about 1e-6: a draw
that falls that close to the border between two tokens can go the other way. A request with a
``seed`` of its own draws by that seed instead of the count, so it repeats whenever it comes, also
after an answer that was lost; the real server ignores the field.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from cachetools import LRUCache
from torch import Tensor

from cartridge_distill.sync.versions import run_of, step_of

_BLOCK = 256
_REQUESTS_KEPT = 2**16  # about 20 MB; a step of a run sends some hundreds


@dataclass
class RequestSeeds:
    """Hands out one generator per choice; counts how often the same request came.

    Without the count, the same prompt sent twice with one cartridge would give the same text twice.
    Runs are counted apart. A request that comes again after ``_REQUESTS_KEPT`` others is counted
    from the start: the memory of a server that runs for months is bounded.
    """

    server_seed: int
    _seen: LRUCache[tuple[bytes, tuple[str, ...]], int] = field(
        default_factory=lambda: LRUCache(_REQUESTS_KEPT)
    )

    def generators(
        self,
        prompt_ids: Sequence[int],
        cartridge_ids: Sequence[str],
        num_choices: int,
        seed: int | None = None,
    ) -> list[random.Random]:
        """One generator per choice of a request; ``seed`` is the request's own."""
        digest = hashlib.sha256(str(self.server_seed).encode())
        digest.update(np.asarray(prompt_ids, dtype="<i8").tobytes())
        for cartridge_id in cartridge_ids:
            of_a_run = run_of(cartridge_id) is not None
            name = (f"step {step_of(cartridge_id)}" if of_a_run else cartridge_id).encode()
            digest.update(b"|%d|" % len(name) + name)
        if seed is not None:
            digest.update(b"|seed %d" % seed)
        drawn = digest.digest()[:16]
        repeat = 0
        if seed is None:
            request = (drawn, tuple(cartridge_ids))
            repeat = self._seen.get(request, 0)
            self._seen[request] = repeat + 1
        return [
            random.Random(int.from_bytes(drawn, "big") * 2**64 + repeat * 2**32 + choice)
            for choice in range(num_choices)
        ]


def choose(
    logits: Tensor, temperatures: Sequence[float], generators: Sequence[random.Random]
) -> tuple[list[int], list[float]]:
    """One token per row.

    Args:
        logits: ``[n, V]``.
        temperatures: n values; 0 is greedy.
        generators: n generators; one number is drawn from each row that is not greedy.

    Returns:
        n token ids and n log-probs (see the module). A row whose logits are not finite gets NaN.
    """
    greedy = [temperature == 0.0 for temperature in temperatures]
    divisor = [1.0 if temperature == 0.0 else temperature for temperature in temperatures]
    scaled = logits.float() / torch.tensor(divisor, device=logits.device)[:, None]
    logprobs = torch.log_softmax(scaled, dim=-1)
    ids = scaled.argmax(dim=-1)
    if not all(greedy):
        # A draw for a greedy row is not needed, and is overwritten.
        draws = [
            0.0 if is_greedy else generator.random()
            for is_greedy, generator in zip(greedy, generators, strict=True)
        ]
        uniform = torch.tensor(draws, dtype=torch.float64, device=logits.device)
        # A row of NaN draws token 0; its log-prob stays NaN and says so.
        sampled = _inverse_cdf(logprobs.exp().nan_to_num(0.0), uniform)
        ids = torch.where(torch.tensor(greedy, device=logits.device), ids, sampled)
    chosen = logprobs.gather(1, ids[:, None])[:, 0]
    return ids.tolist(), chosen.tolist()


def likeliest(
    logits: Tensor, temperatures: Sequence[float], counts: Sequence[int]
) -> list[list[tuple[int, float]]]:
    """The likeliest tokens of each row, of the distribution that :func:`choose` draws from.

    Args:
        logits: ``[n, V]``.
        temperatures: n values; 0 is greedy.
        counts: how many tokens of each of the n rows; 0 computes nothing for the row.

    Returns:
        For each row (id, log-prob), the likeliest first; at most V of them.
    """
    if not any(counts):
        return [[] for _ in counts]
    found: list[list[tuple[int, float]]] = []
    for row, temperature, count in zip(logits, temperatures, counts, strict=True):
        if not count:
            found.append([])
            continue
        logprobs = torch.log_softmax(row.float() / (temperature or 1.0), dim=-1)
        values, ids = logprobs.topk(min(count, len(logprobs)))
        found.append(list(zip(ids.tolist(), values.tolist(), strict=True)))
    return found


def _inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the running sum of ``probs`` ``[n, V]`` passes ``uniform`` ``[n]``.

    In two steps (which block, which token in it), so that the float64 sums run over V / 256 and 256
    values and not over V.
    """
    rows, vocab = probs.shape
    padded = torch.nn.functional.pad(probs, (0, -vocab % _BLOCK))
    blocks = padded.view(rows, -1, _BLOCK)
    block, within = _passing(blocks.sum(-1).double().cumsum(-1), uniform)
    inside = blocks[torch.arange(rows, device=probs.device), block].double().cumsum(-1)
    place, _ = _passing(inside, within)
    return block * _BLOCK + place


def _passing(running: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor]:
    """Where a running sum ``[n, k]`` passes ``fraction`` of its total.

    Returns:
        The index ``[n]``, and how far into that entry the point lies, as a fraction ``[n]``.
    """
    target = fraction * running[:, -1]
    # right=True: entries of probability 0 do not move the sum and are stepped over.
    index = torch.searchsorted(running, target[:, None], right=True)[:, 0]
    # Rounding may put the target on the total; the last entry that moved the sum is then meant.
    last = torch.searchsorted(running, running[:, -1:].contiguous())[:, 0]
    index = torch.minimum(index, last)
    at = index[:, None]
    before = torch.where(index > 0, running.gather(1, (at - 1).clamp(min=0))[:, 0], 0.0)
    width = running.gather(1, at)[:, 0] - before
    return index, ((target - before) / width).clamp(0.0, 1.0)
