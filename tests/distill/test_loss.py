"""The losses against their definitions, and where the usual shortcuts go wrong."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cartridge_distill.distill.loss import LOSSES, Loss, TeacherTopK, get_loss, top_ids
from cartridge_distill.distill.token_loss import TokenLoss
from cartridge_distill.util.errors import ConfigError

ROWS, VOCAB, K, TAU = 9, 60, 5, 1.3

Written = Callable[[Tensor, Tensor], Tensor]


def _forward(p: Tensor, q: Tensor) -> Tensor:
    return torch.special.xlogy(p, p / q).sum(-1)


def _reverse(p: Tensor, q: Tensor) -> Tensor:
    return _forward(q, p)


def _mixed(weight: float) -> Written:
    return lambda p, q: (1 - weight) * _forward(p, q) + weight * _reverse(p, q)


def _jensen_shannon(weight: float) -> Written:
    def written(p: Tensor, q: Tensor) -> Tensor:
        mean = weight * p + (1 - weight) * q
        return weight * _forward(p, mean) + (1 - weight) * _forward(q, mean)

    return written


def _cross_entropy(p: Tensor, q: Tensor) -> Tensor:
    return -(p * q.log())[:, :K].sum(-1)


# name, weight, and the formula over [N, K + 1] probabilities of teacher and student
DEFINITIONS: list[tuple[str, float | None, Written]] = [
    ("forward_kl_topk", None, _forward),
    ("topk_cross_entropy", None, _cross_entropy),
    ("reverse_kl", None, _reverse),
    ("reverse_kl_student_topk", None, _reverse),
    ("kl_mix", None, _mixed(0.5)),
    ("kl_mix", 0.2, _mixed(0.2)),
    ("jensen_shannon", None, _jensen_shannon(0.5)),
    ("jensen_shannon", 0.9, _jensen_shannon(0.9)),
]
every_loss = pytest.mark.parametrize(
    ("name", "weight", "written"), DEFINITIONS, ids=[f"{n}-{w}" for n, w, _ in DEFINITIONS]
)
divergences = pytest.mark.parametrize(
    ("name", "weight"), [(n, w) for n, w, _ in DEFINITIONS if LOSSES[n].divergence]
)


def test_every_loss_is_tested() -> None:
    assert {name for name, _, _ in DEFINITIONS} == set(LOSSES)


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64) * 3
    teacher = torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64) * 3
    return student, teacher


def told(
    loss: Loss, teacher: Tensor, student: Tensor, k: int = K, temperature: float = TAU
) -> TeacherTopK:
    """The teacher, asked about the student's tokens where the loss wants to know of them."""
    asked = top_ids(student.detach(), k) if loss.asks else None
    return TeacherTopK.from_logits(teacher, k, temperature, asked)


def with_tail(logits: Tensor, ids: Tensor, temperature: float = TAU) -> Tensor:
    """``[N, K + 1]`` probabilities of the given tokens and of all others together."""
    probabilities = (logits / temperature).softmax(-1)
    top = probabilities.gather(1, ids)
    rest = torch.ones_like(probabilities).scatter(1, ids, 0.0)
    return torch.cat([top, (probabilities * rest).sum(-1, keepdim=True)], dim=1)


@every_loss
def test_the_definition_with_its_gradient(
    name: str, weight: float | None, written: Written
) -> None:
    loss = get_loss(name, weight)
    student, teacher_logits = pair()
    student.requires_grad_()
    teacher = told(loss, teacher_logits, student)
    ids = teacher.ids if teacher.asked is None else teacher.asked.ids
    expected = written(with_tail(teacher_logits, ids), with_tail(student, ids))
    got = loss(student, teacher, TAU)
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=1e-5)
    weights = torch.linspace(0.1, 1, ROWS, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), student, retain_graph=True)[0]
    found = torch.autograd.grad((got * weights).sum(), student)[0]
    torch.testing.assert_close(found, wanted, atol=5e-6, rtol=1e-4)
    assert wanted.abs().max() > 1e-2  # there is something to agree on


@divergences
def test_equal_distributions_have_no_loss_and_no_gradient(name: str, weight: float | None) -> None:
    """veRL's truncated top-k KL has a gradient here."""
    loss = get_loss(name, weight)
    student = pair()[0].float().requires_grad_()
    found = loss(student, told(loss, student.detach(), student, temperature=1.0))
    assert found.abs().max() < 1e-5
    assert torch.autograd.grad(found.sum(), student)[0].abs().max() < 1e-6


@every_loss
def test_k_of_the_whole_vocabulary_has_no_tail(
    name: str, weight: float | None, written: Written
) -> None:
    loss = get_loss(name, weight)
    student, teacher_logits = pair()
    student.requires_grad_()
    p, q = teacher_logits.softmax(-1), student.softmax(-1)
    expected = written(p, q) if name != "topk_cross_entropy" else -(p * q.log()).sum(-1)
    got = loss(student, told(loss, teacher_logits, student, VOCAB, 1.0))
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)
    wanted = torch.autograd.grad(expected.sum(), student)[0]
    found = torch.autograd.grad(got.sum(), student)[0]
    torch.testing.assert_close(found, wanted, atol=5e-6, rtol=1e-4)


@every_loss
def test_more_rows_than_one_block(name: str, weight: float | None, written: Written) -> None:
    loss = get_loss(name, weight)
    generator = torch.Generator().manual_seed(5)
    student = torch.randn(1100, 11, generator=generator).requires_grad_()
    teacher = told(loss, torch.randn(1100, 11, generator=generator), student, 4, 1.0)
    found = loss(student, teacher)
    late = loss(student[900:], teacher.split([900, 200])[1])
    torch.testing.assert_close(found[900:], late)
    gradient = torch.autograd.grad(found[900:].sum(), student, retain_graph=True)[0]
    assert gradient[:900].abs().max() == 0
    torch.testing.assert_close(gradient, torch.autograd.grad(late.sum(), student)[0])


@every_loss
def test_bfloat16_logits_get_bfloat16_gradients(
    name: str, weight: float | None, written: Written
) -> None:
    loss = get_loss(name, weight)
    student, teacher_logits = (each.bfloat16() for each in pair())
    exact = student.double().requires_grad_()
    student.requires_grad_()
    teacher = told(loss, teacher_logits, student)
    found = torch.autograd.grad(loss(student, teacher, TAU).sum(), student)[0]
    wanted = torch.autograd.grad(loss(exact, teacher, TAU).sum(), exact)[0]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=2**-7)


@divergences
def test_mass_outside_the_top_k_is_pulled_back(name: str, weight: float | None) -> None:
    """Near convergence inside the top k, with mass elsewhere, a clamped KL is exactly zero."""
    loss = get_loss(name, weight)
    student = torch.zeros(1, VOCAB)
    student[0, :3] = torch.tensor([6.0, 5.0, 4.0])
    wrong = student.clone()
    wrong[0, 40] = 6.0  # a token that the teacher has in its tail
    wrong.requires_grad_()
    found = loss(wrong, told(loss, student.clone(), wrong, 3, 1.0))
    gradient = torch.autograd.grad(found.sum(), wrong)[0]
    assert found.item() > 0.03
    assert gradient[0, 40] > 0.01  # descent lowers it


@divergences
def test_a_nearly_sure_student_has_a_finite_gradient(name: str, weight: float | None) -> None:
    loss = get_loss(name, weight)
    student = torch.full((1, VOCAB), -20.0)
    student[0, 0] = 20.0
    student.requires_grad_()
    found = loss(student, told(loss, torch.zeros(1, VOCAB), student, K, 1.0))
    gradient = torch.autograd.grad(found.sum(), student)[0]
    assert torch.isfinite(found).all() and torch.isfinite(gradient).all()


def test_the_gradient_of_a_nearly_sure_student_is_exact() -> None:
    """1 - sum(q) would be rounding noise here; the closed form is not."""
    student = torch.full((1, VOCAB), -20.0)
    student[0, 0] = 20.0
    student.requires_grad_()
    teacher = TeacherTopK.from_logits(torch.zeros(1, VOCAB), K)
    loss = get_loss("forward_kl_topk")(student, teacher)
    gradient = torch.autograd.grad(loss.sum(), student)[0]
    q = student.detach().softmax(-1)
    p_tail = 1 - K / VOCAB
    outside = torch.ones(VOCAB, dtype=torch.bool)
    outside[teacher.ids[0]] = False
    rest = q[0, outside].sum()
    expected = q[0, outside] * (1 - p_tail / rest)
    torch.testing.assert_close(gradient[0, outside], expected, rtol=1e-4, atol=1e-7)


def test_the_weight_leads_from_one_direction_to_the_other() -> None:
    student, teacher_logits = pair()
    teacher = TeacherTopK.from_logits(teacher_logits, K)
    ends = [get_loss(name)(student, teacher) for name in ("forward_kl_topk", "reverse_kl")]
    near = [get_loss("kl_mix", weight)(student, teacher) for weight in (1e-6, 1 - 1e-6)]
    torch.testing.assert_close(near, ends, atol=1e-4, rtol=1e-4)


def test_a_token_that_the_student_alone_believes_in() -> None:
    """The teacher's top k do not name it: to the reverse KL over them it is any other token."""
    teacher_logits, student = torch.zeros(1, VOCAB), torch.zeros(1, VOCAB)
    teacher_logits[0, :K], teacher_logits[0, 40] = 6.0, -9.0
    student[0, :K], student[0, 40] = 6.0, 8.0
    named, unnamed = (get_loss(n) for n in ("reverse_kl_student_topk", "reverse_kl"))
    exact = _reverse(teacher_logits.softmax(-1), student.softmax(-1)).item()
    asked = named(student, told(named, teacher_logits, student, K, 1.0)).item()
    lumped = unnamed(student, told(unnamed, teacher_logits, student, K, 1.0)).item()
    assert asked == pytest.approx(exact, rel=0.05) and lumped < 0.6 * exact


def test_a_teacher_that_was_not_asked_is_an_error() -> None:
    student, teacher_logits = pair()
    with pytest.raises(ValueError, match="not asked"):
        get_loss("reverse_kl_student_topk")(student, TeacherTopK.from_logits(teacher_logits, K))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'forward_kl_topk'"):
        get_loss("forward_kl")
    with pytest.raises(ConfigError, match="would be ignored.*kl_mix, jensen_shannon"):
        get_loss("reverse_kl", 0.5)
    for weight in (0, 1, -0.5, float("nan"), True, "half"):
        with pytest.raises(ConfigError, match="above 0 and below 1"):
            get_loss("kl_mix", weight)  # type: ignore[arg-type]


def _settings(**changed: object) -> SimpleNamespace:
    usual = {
        "loss": "forward_kl_topk",
        "loss_weight": None,
        "kl_temperature": TAU,
        "skip_first_tokens": 0,
        "max_token_loss": None,
    }
    return SimpleNamespace(**{**usual, **changed})


def test_first_tokens_without_a_loss_have_no_gradient() -> None:
    student, teacher_logits = pair()
    student.requires_grad_()
    teacher = TeacherTopK.from_logits(teacher_logits, K, TAU)
    whole = TokenLoss.of(_settings())
    some = TokenLoss.of(_settings(skip_first_tokens=3))
    counted = torch.from_numpy(some.counted([5, 2, 2]))
    assert counted.tolist() == [False] * 3 + [True] * 2 + [False] * 4
    everything = torch.from_numpy(whole.counted([5, 2, 2]))
    assert everything.all()
    (all_of_them, _), (found, over) = (
        each(student, teacher, mask) for each, mask in ((whole, everything), (some, counted))
    )
    assert found[~counted].abs().max() == 0 and not over.any()
    torch.testing.assert_close(found[counted], all_of_them[counted])
    gradient = torch.autograd.grad(found.sum(), student)[0]
    assert (gradient.abs().amax(-1) > 0).tolist() == counted.tolist()


def test_a_bound_on_a_tokens_loss_takes_its_gradient_and_is_told() -> None:
    student, teacher_logits = pair()
    student.requires_grad_()
    teacher = TeacherTopK.from_logits(teacher_logits, K, TAU)
    free, _ = TokenLoss.of(_settings())(student, teacher, torch.ones(ROWS, dtype=torch.bool))
    bound = float(free.detach().median())
    bounded = TokenLoss.of(_settings(max_token_loss=bound))
    found, over = bounded(student, teacher, torch.ones(ROWS, dtype=torch.bool))
    assert over.tolist() == (free > bound).tolist() and 0 < over.sum() < ROWS
    torch.testing.assert_close(found, free.clamp(max=bound))
    gradient = torch.autograd.grad(found.sum(), student)[0]
    assert (gradient.abs().amax(-1) > 0).tolist() == (free <= bound).tolist()
