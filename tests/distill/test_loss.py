"""The losses against their definitions, and where the usual shortcuts go wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cartridge_distill.distill.loss import (
    LOSSES,
    TeacherTopK,
    forward_kl_topk,
    get_loss,
    reverse_kl_topk,
    topk_cross_entropy,
)
from cartridge_distill.util.errors import ConfigError

ROWS, VOCAB, K, TAU = 9, 60, 5, 1.3


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64) * 3
    teacher = torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64) * 3
    return student, teacher


def with_tail(logits: Tensor, ids: Tensor) -> Tensor:
    """``[N, K + 1]`` probabilities of the given tokens and of all others together."""
    probabilities = (logits / TAU).softmax(-1)
    top = probabilities.gather(1, ids)
    return torch.cat([top, 1 - top.sum(-1, keepdim=True)], dim=1)


def test_forward_kl_is_its_definition_with_its_gradient() -> None:
    student, teacher_logits = pair()
    student.requires_grad_()
    teacher = TeacherTopK.from_logits(teacher_logits, K, TAU)
    p, q = with_tail(teacher_logits, teacher.ids), with_tail(student, teacher.ids)
    expected = (p * (p.log() - q.log())).sum(-1)
    got = forward_kl_topk(student, teacher, TAU)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    weights = torch.linspace(0.1, 1, ROWS, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), student, retain_graph=True)[0]
    found = torch.autograd.grad((got * weights).sum(), student)[0]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_reverse_kl_is_its_definition() -> None:
    student, teacher_logits = pair()
    teacher = TeacherTopK.from_logits(teacher_logits, K, TAU)
    p, q = with_tail(teacher_logits, teacher.ids), with_tail(student, teacher.ids)
    expected = (q * (q.log() - p.log())).sum(-1)
    got = reverse_kl_topk(student, teacher, TAU)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-4)


def test_cross_entropy_is_the_papers() -> None:
    student, teacher_logits = pair()
    teacher = TeacherTopK.from_logits(teacher_logits, K, TAU)
    p = (teacher_logits / TAU).softmax(-1).gather(1, teacher.ids)
    expected = -(p * (student / TAU).log_softmax(-1).gather(1, teacher.ids)).sum(-1)
    got = topk_cross_entropy(student, teacher, TAU)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def test_equal_distributions_have_no_loss_and_no_gradient() -> None:
    """veRL's truncated top-k KL has a gradient here."""
    student = pair()[0].float().requires_grad_()
    teacher = TeacherTopK.from_logits(student.detach(), K)
    loss = forward_kl_topk(student, teacher)
    assert loss.abs().max() < 1e-5
    assert torch.autograd.grad(loss.sum(), student)[0].abs().max() < 1e-6


def test_mass_outside_the_top_k_is_pulled_back() -> None:
    """Near convergence inside the top k, with mass elsewhere, a clamped KL is exactly zero."""
    student = torch.zeros(1, VOCAB)
    student[0, :3] = torch.tensor([6.0, 5.0, 4.0])
    teacher = TeacherTopK.from_logits(student.clone(), 3)
    wrong = student.clone()
    wrong[0, 40] = 6.0  # a token that the teacher has in its tail
    wrong.requires_grad_()
    loss = forward_kl_topk(wrong, teacher)
    gradient = torch.autograd.grad(loss.sum(), wrong)[0]
    assert loss.item() > 0.1
    assert gradient[0, 40] > 0.1  # descent lowers it


def test_a_nearly_sure_student_has_a_finite_exact_gradient() -> None:
    """1 - sum(q) would be rounding noise here; the closed form is not."""
    student = torch.full((1, VOCAB), -20.0)
    student[0, 0] = 20.0
    student.requires_grad_()
    teacher = TeacherTopK.from_logits(torch.zeros(1, VOCAB), K)
    gradient = torch.autograd.grad(forward_kl_topk(student, teacher).sum(), student)[0]
    q = student.detach().softmax(-1)
    p_tail = 1 - K / VOCAB
    outside = torch.ones(VOCAB, dtype=torch.bool)
    outside[teacher.ids[0]] = False
    rest = q[0, outside].sum()
    expected = q[0, outside] * (1 - p_tail / rest)
    torch.testing.assert_close(gradient[0, outside], expected, rtol=1e-4, atol=1e-7)


def test_k_of_the_whole_vocabulary_is_the_full_kl() -> None:
    student, teacher_logits = pair()
    student = student.float().requires_grad_()
    teacher = TeacherTopK.from_logits(teacher_logits, VOCAB)
    p = teacher_logits.log_softmax(-1)
    expected = (p.exp() * (p - student.double().log_softmax(-1))).sum(-1)
    loss = forward_kl_topk(student, teacher)
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=1e-4)
    assert torch.isfinite(torch.autograd.grad(loss.sum(), student)[0]).all()
    reverse = reverse_kl_topk(student, teacher)
    q = student.detach().double().log_softmax(-1)
    torch.testing.assert_close(
        reverse.detach().double(), (q.exp() * (q - p)).sum(-1), atol=1e-4, rtol=1e-4
    )
    assert torch.isfinite(torch.autograd.grad(reverse.sum(), student)[0]).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_more_rows_than_one_block(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    student = torch.randn(1100, 11, generator=generator).requires_grad_()
    teacher = TeacherTopK.from_logits(torch.randn(1100, 11, generator=generator), 4)
    loss = get_loss(name)(student, teacher, 1.0)
    late = get_loss(name)(
        student[900:], TeacherTopK(teacher.ids[900:], teacher.logprobs[900:]), 1.0
    )
    torch.testing.assert_close(loss[900:], late)
    gradient = torch.autograd.grad(loss[900:].sum(), student)[0]
    assert gradient[:900].abs().max() == 0


def test_an_unknown_loss_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="forward_kl_topk"):
        get_loss("kl")
