"""What is minimised: a divergence between teacher and student, per response token, by its name.

The teacher is known by its K most likely tokens, with probabilities of the full softmax; what is
left of its mass is one more outcome, the *tail*. Without it (veRL's truncated, clamped top-k KL)
the loss and its gradient vanish while much mass is elsewhere, and at p = q the gradient does not.
One loss is over the *student's* K most likely tokens instead, and asks the teacher about them.
Nothing here knows about batches or veRL: N tokens in, N losses out. The formulas are in
``divergences``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cartridge_distill.distill import divergences
from cartridge_distill.distill.divergences import Divergence, Rule
from cartridge_distill.model.logprobs import rows_at_once, tempered
from cartridge_distill.util.errors import ConfigError, nearest


@dataclass(frozen=True)
class TeacherTopK:
    """The teacher's distributions at N places.

    Attributes:
        ids: ``[N, K]`` token ids, most likely first.
        logprobs: ``[N, K]`` float32 log-probs under the full softmax.
        chosen: ``[N]`` log-probs of the tokens that stand there, where they were asked for.
        finite: a bool on the device: no logit was NaN or +inf. Nobody has looked at it yet.
        asked: what it says of tokens that somebody else chose, where it was asked.
    """

    ids: Tensor
    logprobs: Tensor
    chosen: Tensor | None = None
    finite: Tensor | None = None
    asked: TeacherTopK | None = None

    @classmethod
    def from_logits(
        cls, logits: Tensor, k: int, temperature: float = 1.0, asked_ids: Tensor | None = None
    ) -> TeacherTopK:
        """Top-k of ``[N, V]`` logits divided by ``temperature``.

        Args:
            asked_ids: ``[N, K]`` further tokens to be told of, in ``asked``; none twice in a row.
        """
        ids, logprobs, asked = [], [], []
        count = rows_at_once(logits)
        for at, rows in enumerate(logits.split(count)):
            scaled = tempered(rows, temperature)
            best = scaled.topk(min(k, scaled.shape[-1]), dim=-1).indices
            of_all = torch.log_softmax(scaled, dim=-1)
            ids.append(best)
            logprobs.append(torch.gather(of_all, 1, best))
            if asked_ids is not None:
                others = asked_ids[at * count : at * count + len(rows)]
                asked.append(torch.gather(of_all, 1, others))
        # NaN or +inf anywhere in a row makes its log-probs NaN, the likeliest token's, too; a token
        # that is ruled out, -inf, does not.
        finite = torch.isfinite(torch.cat([of_row[:, 0] for of_row in logprobs])).all()
        told = None if asked_ids is None else cls(asked_ids, torch.cat(asked))
        return cls(torch.cat(ids), torch.cat(logprobs), finite=finite, asked=told)

    def split(self, counts: Sequence[int]) -> list[TeacherTopK]:
        """Of so many places each; all share ``finite``, which is of the whole."""
        sizes = list(counts)
        chosen = [None] * len(sizes) if self.chosen is None else self.chosen.split(sizes)
        asked = [None] * len(sizes) if self.asked is None else self.asked.split(sizes)
        parts = zip(self.ids.split(sizes), self.logprobs.split(sizes), chosen, asked, strict=True)
        return [TeacherTopK(i, lp, c, self.finite, a) for i, lp, c, a in parts]

    @classmethod
    def join(cls, parts: Sequence[TeacherTopK]) -> TeacherTopK:
        """One after the other; all have the same fields."""
        chosen = [part.chosen for part in parts if part.chosen is not None]
        finite = [part.finite for part in parts if part.finite is not None]
        asked = [part.asked for part in parts if part.asked is not None]
        return cls(
            torch.cat([part.ids for part in parts]),
            torch.cat([part.logprobs for part in parts]),
            torch.cat(chosen) if chosen else None,
            torch.stack(finite).all() if finite else None,
            cls.join(asked) if asked else None,
        )

    @property
    def tail_logprob(self) -> Tensor:
        """``[N]`` log of the mass outside the top k; -inf when there is none."""
        mass = torch.logsumexp(self.logprobs.double(), dim=-1).clamp(max=0.0)
        return torch.log(-torch.expm1(mass)).float()


def top_ids(logits: Tensor, k: int) -> Tensor:
    """``[N, K]`` the most likely tokens of ``[N, V]`` logits, most likely first."""
    most = min(k, logits.shape[-1])
    return torch.cat(
        [rows.topk(most, dim=-1).indices for rows in logits.split(rows_at_once(logits))]
    )


@dataclass(frozen=True)
class Loss:
    """One of :data:`LOSSES`, ready to be computed.

    Attributes:
        name: in the settings.
        rule: the formula, over K tokens and the tail.
        asks: the K tokens are the student's, and the teacher is asked about them
            (``Teacher.score(asked_ids=...)``).
        divergence: zero, with a zero gradient, where teacher and student agree.
        weighted: a rule for a weight; None where the loss has none.
    """

    name: str
    rule: Rule
    asks: bool = False
    divergence: bool = True
    weighted: Callable[[float], Rule] | None = None

    def __call__(self, logits: Tensor, teacher: TeacherTopK, temperature: float = 1.0) -> Tensor:
        """Nats for each token.

        Args:
            logits: ``[N, V]`` student logits.
            teacher: distributions at the same N places, taken at the same temperature.

        Returns:
            ``[N]``; a divergence is never negative but for rounding.

        Raises:
            ValueError: the teacher was not asked about the student's tokens, and must be.
        """
        told = teacher.asked if self.asks else teacher
        if told is None:
            raise ValueError(f"loss {self.name!r} is over tokens that the teacher was not asked of")
        tail = told.tail_logprob
        if told.ids.shape[1] == logits.shape[1]:
            tail = torch.full_like(tail, float("-inf"))  # what 1 - sum(p) leaves of V is rounding
        found: Tensor = Divergence.apply(
            logits, told.ids, told.logprobs, tail, temperature, self.rule
        )
        return found


EVEN = 0.5
"""The weight of a loss that has one, where the settings name none."""

LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        # KL(teacher || student) over the teacher's top k and the tail
        Loss("forward_kl_topk", divergences.forward_kl),
        # -sum p log q over the teacher's top k, as in the Cartridges paper (arXiv 2506.06266)
        Loss("topk_cross_entropy", divergences.cross_entropy, divergence=False),
        # KL(student || teacher) over the teacher's top k and the tail
        Loss("reverse_kl", divergences.reverse_kl),
        # the same over the student's top k: what the student says and the teacher would not
        Loss("reverse_kl_student_topk", divergences.reverse_kl, asks=True),
        Loss("kl_mix", divergences.kl_mix(EVEN), weighted=divergences.kl_mix),
        Loss(
            "jensen_shannon", divergences.jensen_shannon(EVEN), weighted=divergences.jensen_shannon
        ),
    )
}


def get_loss(name: str, weight: float | None = None) -> Loss:
    """A loss by its name in the settings.

    Args:
        weight: of ``kl_mix`` the reverse KL's part, of ``jensen_shannon`` the teacher's in the
            mixture; above 0 and below 1. None is an even mixture.

    Raises:
        ConfigError: an unknown name, a weight that makes no sense or that the loss would ignore.
    """
    if name not in LOSSES:
        raise ConfigError(f"loss {name!r} is unknown{nearest(name, LOSSES)}")
    loss = LOSSES[name]
    if weight is None:
        return loss
    if loss.weighted is None:
        takers = [each.name for each in LOSSES.values() if each.weighted is not None]
        raise ConfigError(
            f"{weight!r} would be ignored with loss={name}; fix: set null, or a loss that has a "
            f"weight: {', '.join(takers)}"
        )
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1:
        raise ConfigError(
            f"{weight!r} is no weight; fix: set a number above 0 and below 1; the ends are the "
            "losses forward_kl_topk and reverse_kl"
        )
    return replace(loss, rule=loss.weighted(float(weight)))
