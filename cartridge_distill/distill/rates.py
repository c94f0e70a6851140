"""The learning rate over a run: a warm-up, then a straight line down.

Cartridges at Scale (arXiv 2606.04557) trains with 20 steps of warm-up and a linear decay to 2 % of
the rate. A warm-up keeps the first steps, whose gradients are the largest, from throwing away what
the start has of the document; the decay takes the noise of small batches out of the end.
"""

from __future__ import annotations

from collections.abc import Callable

from cartridge_distill.util.errors import ConfigError


def warmed_and_decayed(warmup: int, total: int, last: float) -> Callable[[int], float]:
    """The factor of the rate at each step, from 0.

    Step n of the warm-up has ``(n + 1) / (warmup + 1)``, so that the first one is a step, too. From
    1 the factor then falls by equal amounts to ``last`` at step ``total - 1``, and stays there.

    Args:
        warmup: steps before the full rate.
        total: steps of the run.
        last: the factor at the end, 0 to 1.

    Raises:
        ConfigError: the warm-up leaves no step to decay in.
    """
    if warmup >= total:
        raise ConfigError(
            f"actor.optim.lr_warmup_steps={warmup} of {total} steps: with lr_decay_to the rate "
            "comes down after the warm-up; fix: make it shorter, or train longer"
        )
    way = max(1, total - 1 - warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 1 - (1 - last) * min(1.0, (step - warmup) / way)

    return factor
