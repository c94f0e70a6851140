"""Divergences over the outcomes of a next token: K tokens one by one, and all others together.

With p the teacher's and q the student's probabilities of these K + 1 outcomes, each divergence is a
function of two ``[N, K + 1]`` tables of log-probs. It returns its value and its *pull*: the
derivative by the logit of each outcome, ``q_b (g_b - sum_a q_a g_a)`` with ``g_b = dD / dq_b``, in
a form without cancellation. :class:`Divergence` carries the pull to the V logits: a token of the K
has its own, one of the tail its share ``q_v / q_tail`` of the tail's.

Nothing here knows what the K tokens are, or who chose them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cartridge_distill.model.logprobs import log_total, rows_at_once, tempered

Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Log-probs ``[N, K + 1]`` of teacher and student -> values ``[N]`` and pulls ``[N, K + 1]``."""

LEAST_TAIL = -16.0
"""Log of the least tail mass that a teacher is taken to have where the student's is compared with
it. Float32 tells no smaller one from none, and none would make any student's infinitely wrong."""


def times_log(mass: Tensor, log_ratio: Tensor) -> Tensor:
    """mass * log_ratio with 0 * inf = 0, as the limit has it."""
    return torch.where(mass > 0, mass * log_ratio, torch.zeros_like(mass))


def forward_kl(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """``sum p log(p / q)``; its pull is ``q - p``."""
    p = teacher.exp()
    return times_log(p, teacher - student).sum(-1), student.exp() - p


def cross_entropy(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """``-sum p log q`` over the K tokens alone, without the tail: no divergence.

    It is least where q is p divided by the K tokens' mass. Its pull is ``q m - p`` with m that
    mass, and ``q_tail m`` in the tail.
    """
    p = torch.cat([teacher[:, :-1].exp(), torch.zeros_like(teacher[:, -1:])], dim=1)
    return -times_log(p, student).sum(-1), student.exp() * p.sum(-1, keepdim=True) - p


def reverse_kl(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """``sum q log(q / p)``, with a tail of the teacher's of at least e**-16."""
    tail = teacher[:, -1:].clamp(min=LEAST_TAIL)
    return _mode_seeking(torch.cat([teacher[:, :-1], tail], dim=1), student)


def _mode_seeking(reference: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || reference) with the reference held still."""
    q = student.exp()
    terms = times_log(q, student - reference)
    value = terms.sum(-1)
    return value, terms - q * value[:, None]


def kl_mix(weight: float) -> Rule:
    """``(1 - weight) KL(p || q) + weight KL(q || p)``."""

    def rule(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        (forward, pull), (reverse, other) = (
            each(teacher, student) for each in (forward_kl, reverse_kl)
        )
        return torch.lerp(forward, reverse, weight), torch.lerp(pull, other, weight)

    return rule


def jensen_shannon(weight: float) -> Rule:
    """Generalised Jensen-Shannon divergence (Agarwal et al., arXiv 2306.13649, equation 1).

    ``weight KL(p || m) + (1 - weight) KL(q || m)`` with ``m = weight p + (1 - weight) q``. The
    derivative by q_b is ``(1 - weight) log(q_b / m_b)``: what m itself moves cancels.
    """
    both = torch.tensor([weight, 1 - weight]).log().tolist()

    def rule(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        mixture = torch.logaddexp(teacher + both[0], student + both[1])
        p = teacher.exp()
        of_teacher = times_log(p, teacher - mixture).sum(-1)
        of_student, pull = _mode_seeking(mixture, student)
        return weight * of_teacher + (1 - weight) * of_student, (1 - weight) * pull

    return rule


class Divergence(torch.autograd.Function):
    """A rule between a teacher's outcomes and a student's logits, with its gradient in closed form.

    ``apply(logits [N, V], ids [N, K], logprobs [N, K], tail [N], temperature, rule)`` gives
    ``[N]``. Rows are taken some at a time: the float32 copies are of those rows, and what is kept
    for the backward is the logits themselves and ``[N, K + 1]``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        logprobs: Tensor,
        tail: Tensor,
        temperature: float,
        rule: Rule,
    ) -> Tensor:
        values, pulls, rests = [], [], []
        count = rows_at_once(logits)
        for z, i, lp, lt in zip(
            *(x.split(count) for x in (logits, ids, logprobs, tail)), strict=True
        ):
            student, rest = _outcomes(z, i, temperature)
            value, pull = rule(torch.cat([lp.float(), lt[:, None].float()], dim=1), student)
            values.append(value)
            pulls.append(pull)
            rests.append(rest)
        ctx.save_for_backward(logits, ids, torch.cat(pulls), torch.cat(rests))
        ctx.temperature = temperature
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        logits, ids, pulls, rest = ctx.saved_tensors
        tau = ctx.temperature
        # Without a tail nobody has a share of it.
        rest = rest.masked_fill(torch.isneginf(rest), float("inf"))
        out = torch.empty_like(logits)
        count = rows_at_once(logits)
        for at in range(0, logits.shape[0], count):
            rows = slice(at, at + count)
            pull = pulls[rows] * (grads[0][rows, None] / tau)
            # In place: [rows, V] is far larger than a cache, and fresh memory costs page faults.
            share = (tempered(logits[rows], tau) - rest[rows, None]).exp_()
            out[rows] = share.mul_(pull[:, -1:]).scatter_(1, ids[rows], pull[:, :-1])
        return out, None, None, None, None, None


def _outcomes(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The student's log-probs ``[N, K + 1]``, and ``[N]`` the logsumexp of the tail's logits.

    The tail is summed up from its own logits, not taken as 1 - sum(top): exact also when the
    student is nearly sure.
    """
    scaled = tempered(logits, temperature)
    rest = log_total(scaled.scatter(1, ids, float("-inf")))
    outcomes = torch.cat([torch.gather(scaled, 1, ids), rest], dim=1)
    return outcomes - torch.logsumexp(outcomes, dim=-1, keepdim=True), rest[:, 0]
