"""Whether server and trainer hold the same weights, where both round.

In float32 their log-probs of a chosen token agree to 1e-4, and a bound on the largest difference
says enough. In bfloat16 each rounds its own way, healthy differences reach 0.5, and a cartridge
that is one step old may differ by less. What separates the two is known about the rounding:

**Rounding has one size.** It moves logits by about the same everywhere, and a token's log-prob by
``1 - p`` of that: nothing for a token that is nearly sure. Divided by ``1 - p``, differences of all
tokens have one spread, over four decades of ``1 - p``. These *scaled* differences are compared.

**The trainer knows the size by itself.** It computes some tokens again, with a few of the
cartridge's numbers moved by one unit in the last place (:func:`nudged`). Any change that small
ends in the same spread as another attention kernel or another batch. A server that is wrong from
the start has no say in it. (The server's own repeat will not do: it repeats itself nearly exactly,
right or wrong, and several times more closely than it agrees with a healthy trainer.) Another base,
cartridge or temperature then shows in the mean and in the 95th percentile: :class:`StepLevel`.

**One version back shows in pairs.** The trainer computes some tokens under this version and under
the previous one, without rounding (``float32_forward``). Token by token, is the server nearer to
this version or to the previous one? :class:`VersionEvidence` is a regression that answers, with its
standard error, also where the two lie within the server's rounding; then it takes more tokens, if
need be of more than one step.

Tensors first, without waiting for the device; verdicts second, from floats. The caller fetches the
figures in one transfer and decides what an alarm does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cartridge_distill.cartridge.prefix import Prefix

FACTOR = 2.0
"""How far the differences may exceed the trainer's own rounding. Healthy is 0.7 to 1.3."""

SIGMAS = 6.0
"""Standard errors that a small sample is allowed on top of :data:`FACTOR`."""

QUANTILE = 0.95

SURE = 5.0
"""Standard errors that evidence for a version must have, beyond :data:`MIXED`."""

MIXED = 0.2
"""Part of the tokens that may have another version. Several replicas, one behind, are over it."""

_CLIPPED = 2.0  # of the bound: one outlier at a token that is nearly sure must not be the mean
_CERTAIN = 0.02  # below this, 1 - p is itself made of rounding
_ONE_IN = 61  # a prime: the nudged numbers fall on every head and feature in turn
_FEWEST = 16  # tokens below which a regression's standard error means nothing


def nudged(prefix: Prefix, dtype: torch.dtype) -> Prefix:
    """A cartridge that differs by rounding alone: one number in 61 is moved by one last place.

    Args:
        prefix: the cartridge, in float32 or in what is served.
        dtype: what is served; ``prefix`` is cast to it first.

    Returns:
        Detached tensors of the same shapes, in ``dtype``.
    """
    step = 1.0 + torch.finfo(dtype).eps

    def move(tensor: Tensor) -> Tensor:
        served = tensor.detach().to(dtype)
        chosen = (
            torch.arange(served.numel(), device=served.device).view(served.shape) % _ONE_IN == 0
        )
        return torch.where(chosen, served * step, served)

    return Prefix([move(key) for key in prefix.keys], [move(value) for value in prefix.values])


def scaled(difference: Tensor, logprobs: Tensor) -> Tensor:
    """Differences of log-probs ``[N]`` in units of the logits: divided by ``1 - p``."""
    unsure = -torch.expm1(logprobs.double().clamp(max=0.0))
    return difference.double() / torch.sqrt(unsure**2 + _CERTAIN**2)


def rounding_figures(trainer: Tensor, repeat: Tensor) -> Tensor:
    """The trainer against its own repeat, for :meth:`Rounding.of`.

    Args:
        trainer: ``[N]`` log-probs of chosen tokens.
        repeat: ``[N]`` the same tokens behind the :func:`nudged` cartridge.

    Returns:
        ``[2]`` float64: mean and 95th percentile of the scaled differences.
    """
    size = scaled(repeat - trainer, trainer).abs()
    return torch.stack([size.mean(), size.quantile(QUANTILE)])


@dataclass(frozen=True)
class Rounding:
    """How much rounding moves scaled log-probs here: of this model, number format and cartridge.

    Attributes:
        tokens: how many were measured.
        mean, high: mean and 95th percentile of the scaled differences.
    """

    tokens: int
    mean: float
    high: float

    @classmethod
    def of(cls, tokens: int, figures: Sequence[float], dtype: torch.dtype) -> Rounding:
        """From fetched :func:`rounding_figures`.

        Args:
            tokens: how many went into the figures.
            figures: two numbers.
            dtype: that the model computes in; its precision is the least that rounding can be.

        Raises:
            ValueError: the figures are not finite.
        """
        if not all(map(math.isfinite, figures)):
            raise ValueError(f"the trainer's own log-probs are not finite: rounding {figures}")
        least = torch.finfo(dtype).eps
        mean, high = figures
        return cls(tokens, max(mean, least), max(high, least))

    def mean_bound(self, tokens: float) -> float:
        """The most that the mean over so many tokens (at least 1) may be."""
        return self.mean * (FACTOR + SIGMAS * math.sqrt(1 / tokens + 1 / self.tokens))

    @property
    def high_bound(self) -> float:
        """What all but a twentieth of the tokens must stay under."""
        return self.high * (FACTOR + SIGMAS / math.sqrt(self.tokens))

    def at(self, temperature_ratio: float) -> Rounding:
        """The same at another temperature, given as a multiple: colder log-probs lie further apart.

        Raises:
            ValueError: the multiple is not above 0.
        """
        if not temperature_ratio > 0:
            raise ValueError(f"temperature ratio {temperature_ratio}: must be above 0")
        return Rounding(self.tokens, self.mean / temperature_ratio, self.high / temperature_ratio)


LEVEL_FIGURES = ("tokens", "sum", "max", "scaled_sum", "scaled_high", "over", "not_finite")


def level_figures(trainer: Tensor, server: Tensor, counted: Tensor, high_bound: float) -> Tensor:
    """How far server and trainer are apart, for :class:`StepLevel`.

    Args:
        trainer: ``[N]`` the trainer's log-probs of chosen tokens.
        server: ``[N]`` the server's.
        counted: ``[N]`` bool, the tokens that count.
        high_bound: :meth:`Rounding.high_bound`; infinite where there is none.

    Returns:
        ``[7]`` float64, :data:`LEVEL_FIGURES`. The 95th percentile is NaN when nothing counts; what
        is over twice the bound counts as twice the bound in the scaled sum.
    """
    difference = (server.to(trainer) - trainer).double()
    finite = difference.isfinite()
    good = counted & finite
    none = torch.zeros_like(difference)
    size = torch.where(good, difference.abs(), none)
    by_rounding = torch.where(good, scaled(difference, trainer).abs(), none)
    seen = torch.where(good, by_rounding, torch.full_like(none, float("nan")))
    return torch.stack(
        [
            good.sum().double(),
            size.sum(),
            size.max(),
            by_rounding.clamp(max=_CLIPPED * high_bound).sum(),
            seen.nanquantile(QUANTILE),
            (by_rounding > high_bound).sum().double(),
            (counted & ~finite).sum().double(),
        ]
    )


@dataclass
class StepLevel:
    """The differences of one step so far, micro-batch after micro-batch, of one author's tokens."""

    rounding: Rounding
    tokens: float = 0.0
    scaled_sum: float = 0.0
    over: float = 0.0

    @property
    def mean(self) -> float:
        """Of the scaled differences; NaN while there is no token."""
        return self.scaled_sum / self.tokens if self.tokens else math.nan

    def add(self, figures: Sequence[float]) -> str | None:
        """Takes fetched :func:`level_figures` in.

        Returns:
            What is wrong with all the tokens so far, or None.
        """
        found = dict(zip(LEVEL_FIGURES, figures, strict=True))
        if found["not_finite"]:
            return f"{found['not_finite']:.0f} log-probs are not finite"
        self.tokens += found["tokens"]
        self.scaled_sum += found["scaled_sum"]
        self.over += found["over"]
        if not self.tokens:
            return None
        mean = self.mean
        bound = self.rounding.mean_bound(self.tokens)
        if not mean <= bound:
            return (
                f"the mean over {self.tokens:.0f} tokens is {mean:.3g} in units of the logits, the "
                f"trainer's own rounding {self.rounding.mean:.2g}, bound {bound:.2g}"
            )
        # A few more than a twentieth, so that one token of a short answer is no alarm.
        if self.over > (1 - QUANTILE) * self.tokens + 4:
            return (
                f"{self.over:.0f} of {self.tokens:.0f} tokens are over "
                f"{self.rounding.high_bound:.2g} in units of the logits, where "
                f"rounding leaves hardly any; a twentieth is the bound"
            )
        return None


def version_figures(trainer: Tensor, previous: Tensor, server: Tensor, counted: Tensor) -> Tensor:
    """Is the server nearer to this version or to the one before: sums for a regression.

    With c, p and s the log-probs under the current version, the previous one and of the server,
    x = p - c and y = s - (p + c) / 2: y is -x/2 when the server has the current version and x/2
    when it has the previous one, and whatever rounding c and p have cancels in the product x * y,
    which it would not if s - c were regressed on p - c.

    Args:
        trainer, previous, server: ``[N]`` log-probs of chosen tokens.
        counted: ``[N]`` bool, the tokens that count.

    Returns:
        ``[4]`` float64: how many tokens, and the sums of x x, x y and y y over them; what is not
        finite is left out.
    """
    middle = (trainer + previous) / 2
    x = scaled(previous - trainer, middle)
    y = scaled(server.to(trainer) - middle, middle)
    good = counted & x.isfinite() & y.isfinite()
    none = torch.zeros_like(x)
    x, y = torch.where(good, x, none), torch.where(good, y, none)
    return torch.stack([good.sum().double(), (x * x).sum(), (x * y).sum(), (y * y).sum()])


@dataclass
class VersionEvidence:
    """Which version the server has, from as many steps as it takes.

    Undecided evidence is kept and added to; evidence that decides for the current version is
    dropped, so that a server that falls behind later does not live on its past. Where the versions
    differ by nothing at all, the sum wanders and decides neither way.
    """

    tokens: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0
    steps: int = 0

    def add(self, figures: Sequence[float]) -> None:
        """Takes one step's fetched :func:`version_figures` in."""
        if self.current:
            self.tokens = self.xx = self.xy = self.yy = 0.0
            self.steps = 0
        tokens, xx, xy, yy = figures
        self.tokens += tokens
        self.xx += xx
        self.xy += xy
        self.yy += yy
        self.steps += 1

    @property
    def stale(self) -> bool:
        """The server has the previous version, or for a part of the tokens, beyond doubt."""
        coefficient, error = self.coefficient
        return coefficient - SURE * error > MIXED

    @property
    def current(self) -> bool:
        """The server has the current version, but for a small part perhaps, beyond doubt."""
        coefficient, error = self.coefficient
        return coefficient + SURE * error < 1 - MIXED

    @property
    def coefficient(self) -> tuple[float, float]:
        """0 for the current version, 1 for the previous one, between for a mixture.

        Returns:
            The coefficient and its standard error; (0.5, inf) when nothing can be told.
        """
        if self.tokens < _FEWEST or self.xx <= 0.0:
            return 0.5, math.inf
        slope = self.xy / self.xx
        rest = max(self.yy - slope * self.xy, 0.0) / (self.tokens - 1)
        return 0.5 + slope, math.sqrt(rest / self.xx)
