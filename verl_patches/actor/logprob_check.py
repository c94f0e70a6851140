"""Server against trainer: both hold the same numbers, or nothing is trained on them.

The student's tokens are compared with the student's forward, the teacher's with the teacher's. A
stale cartridge shows in the one, an answer that was written without the document in the other.

With ``max_logprob_diff`` a number, that bounds the largest difference
(:class:`LogprobDifferences`). With null, :class:`RoundingCheck` runs the test of
``cartridge_distill.distill.rounding``, which holds where server and trainer round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.distill.mixing import STUDENT, TEACHER
from cartridge_distill.distill.rounding import (
    LEVEL_FIGURES,
    Rounding,
    StepLevel,
    VersionEvidence,
    level_figures,
    nudged,
    rounding_figures,
    version_figures,
)
from cartridge_distill.util.errors import OffPolicyError

_CAUSES = {
    STUDENT: "the server does not serve this cartridge version, or not this base model, dtype or "
    "temperature",
    TEACHER: "the server wrote without the document, or with another base model, dtype or "
    "temperature, or teacher_cache keeps the answers of such a server",
}

ROUNDING_EVERY = 64
"""Versions after which the rounding is measured again; a cartridge that grows rounds more."""

FEWEST_TOKENS = 32
"""Tokens that the rounding is measured on at least. Until then, in the first batches of a run with
very short answers, the differences are logged and only their being finite is checked."""

_VERSION, _LEVEL = "version", {STUDENT: "level/student", TEACHER: "level/teacher"}


@dataclass(frozen=True)
class LogprobDifferences:
    """How far the log-probs of one author's tokens are apart. Nothing here waits for the device.

    Attributes:
        author: who wrote the tokens.
        trainer: ``[N]`` the trainer's log-probs, N at least 1.
        server: ``[N]`` the server's.
        tokens: ``[N]`` their ids.
    """

    author: str
    trainer: Tensor
    server: Tensor
    tokens: Tensor

    @property
    def absolute(self) -> Tensor:
        """``[N]``, absolute; NaN where either is."""
        return (self.trainer - self.server).abs()

    def check(self, largest: float, bound: float | None) -> None:
        """Refuses the tokens when the numbers differ.

        Args:
            largest: the largest difference, fetched.
            bound: None only wants finite numbers.

        Raises:
            OffPolicyError: it is over the bound, or not finite.
        """
        limit = torch.finfo(torch.float32).max if bound is None else bound
        if largest <= limit:
            return
        worst = int(self.absolute.nan_to_num(float("inf")).argmax())
        raise OffPolicyError(
            f"server and trainer disagree on a chosen token's log-prob by {largest:.3g} "
            f"(server {self.server[worst]:.4f}, trainer {self.trainer[worst]:.4f}, "
            f"token {int(self.tokens[worst])}, written by the {self.author}), bound {limit:g}: "
            f"{_CAUSES[self.author]}; fix: serve what is trained. For a bfloat16 server set "
            "actor.cartridge.max_logprob_diff=null, which compares with "
            "the rounding instead"
        )


@dataclass(frozen=True)
class OfStudent:
    """The counted tokens of a micro-batch, where the student's are looked at.

    Attributes:
        trainer: ``[N]`` their log-probs by the cartridge that is trained.
        own: ``[N]`` by the cartridge that wrote them.
        server: ``[N]`` the log-probs that came with them.
        counted: ``[N]`` bool, the student's that are compared.
    """

    trainer: Tensor
    own: Tensor
    server: Tensor
    counted: Tensor


@dataclass(frozen=True)
class VersionPair:
    """Which of two versions does the server have, for tokens of one of them?

    Attributes:
        version: that the tokens should be of.
        own: its cartridge.
        before: the cartridge of the version before.
        counted: ``[N]`` bool, the student's tokens of the version.
    """

    version: int
    own: Prefix
    before: Prefix
    counted: Tensor


class RoundingCheck:
    """The test where both round, of one engine: what it measured, and the evidence so far.

    Ranks of a sharded model must run it equally often, and do: the extra forwards belong to a
    rank's first micro-batch of a step, whatever is in it.

    Args:
        dtype: that the model computes in, and the server.
        everybody: whether all ranks answer yes; they measure equally often.
    """

    def __init__(
        self, dtype: torch.dtype, everybody: Callable[[bool], bool] = lambda answer: answer
    ) -> None:
        self._dtype, self._everybody = dtype, everybody
        self._rounding: Rounding | None = None
        self._measured_at = 0
        self._so_far = (0, 0.0, 0.0)  # tokens, and the sums over them that wait to be enough
        self._levels: dict[str, StepLevel] = {}
        self._evidence = VersionEvidence()
        self._asked = 0  # the version that the evidence is asked about
        self._first = True

    def begin_batch(self) -> None:
        """Before the first micro-batch of a batch."""
        self._levels = {}
        self._first = True

    def forget(self) -> None:
        """After a checkpoint was loaded: the version before it is not known.

        The first batch then asks no version question; its labels and levels are checked.
        """
        self._evidence = VersionEvidence()

    def student_figures(
        self,
        version: int,
        tokens: OfStudent,
        pair: Callable[[], VersionPair | None],
        current: Prefix,
        behind: Callable[[Prefix], Tensor],
        exactly: Callable[[Prefix], Tensor],
    ) -> dict[str, Tensor]:
        """What is to be known of a micro-batch of the student's tokens.

        The host waits where the rounding is measured, every :data:`ROUNDING_EVERY` versions.

        Args:
            version: that is trained.
            tokens: all counted tokens of the micro-batch.
            pair: which two versions the first tokens are asked about; None where there is no
                version before.
            current: the cartridge.
            behind: log-probs ``[n <= N]`` of the first counted tokens behind another cartridge, by
                the trainer's own forward.
            exactly: the same without rounding, behind the cartridge as it is served.

        Returns:
            For :meth:`judge`, fetched.
        """
        first, self._first = self._first, False
        if first and (self._rounding is None or version - self._measured_at >= ROUNDING_EVERY):
            self._measure(version, tokens.trainer, behind(nudged(current, self._dtype)))
        figures: dict[str, Tensor] = {}
        if first and (asked := pair()) is not None:
            here, before = exactly(asked.own), exactly(asked.before)
            some = slice(len(before))
            figures[_VERSION] = version_figures(
                here, before, tokens.server[some], asked.counted[some]
            )
            self._asked = asked.version
        figures |= self._level_figures(STUDENT, tokens.own, tokens.server, tokens.counted, 1.0)
        if self._rounding is None:
            waiting = torch.tensor(float(self._so_far[0]), device=tokens.trainer.device)
            figures["logprob_diff/rounding_tokens"] = waiting
        return figures

    def teacher_figures(
        self, chosen: Tensor, server: Tensor, counted: Tensor, temperature_ratio: float
    ) -> dict[str, Tensor]:
        """What is to be known of a micro-batch of the teacher's tokens.

        Args:
            chosen: ``[N]`` log-probs of all counted tokens by the teacher's forward.
            server: ``[N]`` the log-probs that came with them.
            counted: ``[N]`` bool, those that the teacher wrote.
            temperature_ratio: the teacher's over the student's.
        """
        return self._level_figures(TEACHER, chosen, server, counted, temperature_ratio)

    def judge(self, figures: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Checks a micro-batch before anything is trained on it.

        Args:
            figures: fetched; others than this check's are left alone.

        Returns:
            Metrics.

        Raises:
            OffPolicyError: another base, cartridge or temperature, or the version before; or the
                teacher's forward does not agree with the teacher's tokens.
        """
        metrics: dict[str, float] = {}
        if _VERSION in figures:  # first: it names the cause
            metrics |= self._version(figures[_VERSION])
        if _LEVEL[STUDENT] in figures:
            metrics |= self._level(STUDENT, figures[_LEVEL[STUDENT]])
        if _LEVEL[TEACHER] in figures:
            self._level(TEACHER, figures[_LEVEL[TEACHER]])
        return metrics

    def _measure(self, version: int, trainer: Tensor, repeat: Tensor) -> None:
        """Measures the rounding, from as many batches as it takes to have enough tokens."""
        count = int(repeat.shape[0])
        if count:
            mean, high = rounding_figures(trainer[:count], repeat).tolist()
            tokens, means, highs = self._so_far
            self._so_far = (tokens + count, means + count * mean, highs + count * high)
        tokens, means, highs = self._so_far
        if not self._everybody(tokens >= FEWEST_TOKENS):
            return  # a size taken from a few tokens may be nothing, and would refuse healthy ones
        self._rounding = Rounding.of(tokens, (means / tokens, highs / tokens), self._dtype)
        self._measured_at, self._so_far = version, (0, 0.0, 0.0)

    def _level_figures(
        self,
        author: str,
        trainer: Tensor,
        server: Tensor,
        counted: Tensor,
        temperature_ratio: float,
    ) -> dict[str, Tensor]:
        if self._rounding is None:
            return {}  # not enough tokens yet
        if author not in self._levels:
            self._levels[author] = StepLevel(self._rounding.at(temperature_ratio))
        bound = self._levels[author].rounding.high_bound
        return {_LEVEL[author]: level_figures(trainer, server, counted, bound)}

    def _level(self, author: str, figures: Sequence[float]) -> dict[str, float]:
        level = self._levels[author]
        if problem := level.add(figures):
            raise OffPolicyError(
                f"server and trainer disagree on the log-probs of tokens written by the {author}: "
                f"{problem}: {_CAUSES[author]}; fix: serve what is trained. If the server is right "
                "and only rounds more than "
                "the trainer, bound the largest difference instead, with "
                "actor.cartridge.max_logprob_diff (0.5 suits bfloat16)"
            )
        found = dict(zip(LEVEL_FIGURES, figures, strict=True))
        if not found["tokens"]:
            return {}
        return {
            "logprob_diff/scaled_mean": level.mean,
            "logprob_diff/scaled_mean_bound": level.rounding.mean_bound(level.tokens),
            "logprob_diff/scaled_q95": found["scaled_high"],
            "logprob_diff/scaled_q95_bound": level.rounding.high_bound,
        }

    def _version(self, figures: Sequence[float]) -> dict[str, float]:
        evidence = self._evidence
        evidence.add(figures)
        coefficient, error = evidence.coefficient
        if evidence.stale:
            self._evidence = VersionEvidence()  # a caller that goes on asks anew
            raise OffPolicyError(
                f"rollouts labelled step {self._asked} were made, all or some, by the version "
                f"before: stale coefficient {coefficient:.2f} +- {error:.2g} (0 is this version, 1 "
                f"the one before) over {evidence.tokens:.0f} tokens of {evidence.steps} step(s): "
                "the server does not serve the version it names. The rollout proxy or the sync is "
                "out of order"
            )
        metrics = {"logprob_diff/version_decided": float(evidence.current)}
        if error < 1.0:  # else the versions differ by too little, and a curve would show noise
            metrics["logprob_diff/stale_coefficient"] = coefficient
            metrics["logprob_diff/stale_coefficient_error"] = error
        return metrics
