"""What is minimised: a divergence between teacher and student, per response token.

The teacher is known by its K most likely tokens, with probabilities of the full softmax; what is
left of its mass is one more outcome, the *tail*. Without it (veRL's truncated, clamped top-k KL)
the loss and its gradient vanish while much mass is elsewhere, and at p = q the gradient does not.
Nothing here knows about batches or veRL: N tokens in, N losses out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cartridge_distill.model.logprobs import ROWS_AT_ONCE, tempered
from cartridge_distill.util.errors import ConfigError


@dataclass(frozen=True)
class TeacherTopK:
    """The teacher's distributions at N places.

    Attributes:
        ids: ``[N, K]`` token ids, most likely first.
        logprobs: ``[N, K]`` float32 log-probs under the full softmax.
        chosen: ``[N]`` log-probs of the tokens that stand there, where they were asked for.
        finite: a bool on the device: no logit was NaN or +inf. Nobody has looked at it yet.
    """

    ids: Tensor
    logprobs: Tensor
    chosen: Tensor | None = None
    finite: Tensor | None = None

    @classmethod
    def from_logits(cls, logits: Tensor, k: int, temperature: float = 1.0) -> TeacherTopK:
        """Top-k of ``[N, V]`` logits divided by ``temperature``."""
        ids, logprobs, totals = [], [], []
        for rows in logits.split(ROWS_AT_ONCE):
            scaled = tempered(rows, temperature)
            top, at = scaled.topk(min(k, scaled.shape[-1]), dim=-1)
            total = torch.logsumexp(scaled, dim=-1, keepdim=True)
            ids.append(at)
            logprobs.append(top - total)
            totals.append(total)
        # NaN or +inf anywhere in a row makes its sum so; a token that is ruled out, -inf, does not.
        finite = torch.isfinite(torch.cat(totals)).all()
        return cls(torch.cat(ids), torch.cat(logprobs), finite=finite)

    @property
    def tail_logprob(self) -> Tensor:
        """``[N]`` log of the mass outside the top k; -inf when there is none."""
        mass = torch.logsumexp(self.logprobs.double(), dim=-1).clamp(max=0.0)
        return torch.log(-torch.expm1(mass)).float()


def _student_topk(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs ``[N, K]`` of the teacher's tokens and ``[N]`` of everything else.

    The tail is summed up from its own logits, not taken as 1 - sum(top): exact also when the
    student is nearly sure.

    Returns:
        Those two, and ``[N]`` the logsumexp of the logits divided by the temperature.
    """
    scaled = tempered(logits, temperature)
    total = torch.logsumexp(scaled, dim=-1, keepdim=True)
    top = torch.gather(scaled, 1, ids) - total
    rest = torch.logsumexp(scaled.scatter(1, ids, float("-inf")), dim=-1, keepdim=True)
    return top, (rest - total)[:, 0], total[:, 0]


def _times_log(mass: Tensor, log_ratio: Tensor) -> Tensor:
    """mass * log_ratio with 0 * inf = 0, as the limit has it."""
    return torch.where(mass > 0, mass * log_ratio, torch.zeros_like(mass))


class _ForwardKLTopK(torch.autograd.Function):
    """KL(teacher || student) over K tokens and the tail, with its gradient in closed form.

    With q the student's softmax, q_t its tail mass, p and p_t the teacher's:
    d/dz_v = (q_v - p_v) / tau inside the top k, q_v * (1 - p_t / q_t) / tau outside. One ``[N, V]``
    buffer instead of autograd's several, and no cancellation when q_t is tiny.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor, temperature: float
    ) -> Tensor:
        losses, totals, rests = [], [], []
        for z, i, lp, lt in zip(
            *(x.split(ROWS_AT_ONCE) for x in (logits, ids, logprobs, tail)), strict=True
        ):
            top, rest, total = _student_topk(z, i, temperature)
            p, p_tail = lp.exp(), lt.exp()
            loss = _times_log(p, lp - top).sum(-1) + _times_log(p_tail, lt - rest)
            losses.append(loss)
            totals.append(total)
            rests.append(rest)
        ctx.save_for_backward(logits, ids, logprobs, tail, torch.cat(totals), torch.cat(rests))
        ctx.temperature = temperature
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, ids, logprobs, tail, total, rest = ctx.saved_tensors
        tau = ctx.temperature
        out = torch.empty_like(logits)
        for at in range(0, logits.shape[0], ROWS_AT_ONCE):
            rows = slice(at, at + ROWS_AT_ONCE)
            # In place: [rows, V] is far larger than a cache, and fresh memory costs page faults.
            q = (tempered(logits[rows], tau) - total[rows, None]).exp_()
            # p_t / q_t; where the teacher has no tail the ratio is 0 whatever the student has.
            ratio = torch.where(torch.isneginf(tail[rows]), 0.0, torch.exp(tail[rows] - rest[rows]))
            scale = grads[0][rows, None] / tau
            inside = (torch.gather(q, 1, ids[rows]) - logprobs[rows].exp()) * scale
            out[rows] = q.mul_((1.0 - ratio[:, None]) * scale).scatter_(1, ids[rows], inside)
        return out, None, None, None, None


def forward_kl_topk(logits: Tensor, teacher: TeacherTopK, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) over the teacher's top k and the tail, in nats.

    Args:
        logits: ``[N, V]`` student logits.
        teacher: distributions at the same N places, taken at the same temperature.

    Returns:
        ``[N]``, never negative but for rounding; zero with zero gradient when both agree.
    """
    tail = teacher.tail_logprob
    if teacher.ids.shape[1] == logits.shape[1]:
        tail = torch.full_like(tail, float("-inf"))  # all of V: what 1 - sum(p) leaves is rounding
    loss: Tensor = _ForwardKLTopK.apply(logits, teacher.ids, teacher.logprobs, tail, temperature)
    return loss


def topk_cross_entropy(logits: Tensor, teacher: TeacherTopK, temperature: float = 1.0) -> Tensor:
    """-sum p log q over the teacher's top k, as in the Cartridges paper (arXiv 2506.06266)."""
    scaled = tempered(logits, temperature)
    top = torch.gather(scaled, 1, teacher.ids) - torch.logsumexp(scaled, dim=-1, keepdim=True)
    return -(teacher.logprobs.exp() * top).sum(-1)


def reverse_kl_topk(logits: Tensor, teacher: TeacherTopK, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) over the teacher's top k and the tail, in nats, ``[N]``."""
    top, tail, _ = _student_topk(logits, teacher.ids, temperature)
    inside = (top.exp() * (top - teacher.logprobs)).sum(-1)
    if teacher.ids.shape[1] == logits.shape[1]:
        return inside  # all of V: there is no tail
    # A teacher without a tail would make any student tail infinitely wrong; float32 has no such
    # certainty, so its tail is at least the smallest mass that float32 tells from none.
    teacher_tail = teacher.tail_logprob.clamp(min=-16.0)
    return inside + _times_log(tail.exp(), tail - teacher_tail)


LossFunction = Callable[[Tensor, TeacherTopK, float], Tensor]

LOSSES: dict[str, LossFunction] = {
    "forward_kl_topk": forward_kl_topk,
    "topk_cross_entropy": topk_cross_entropy,
    "reverse_kl": reverse_kl_topk,
}


def get_loss(name: str) -> LossFunction:
    """A loss by its name in the config.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in LOSSES:
        raise ConfigError(f"loss {name!r} is unknown; choose one of {sorted(LOSSES)}")
    return LOSSES[name]
