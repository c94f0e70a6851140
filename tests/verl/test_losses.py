"""Losses, their tokens and general rows in the engine, against plain one-by-one forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from cartridge_distill.distill.loss import LOSSES, TeacherTopK, get_loss, top_ids
from cartridge_distill.util.errors import DocumentError, RolloutError
from tests.tiny import plain_distributions, tiny_model
from tests.verl.engine_rig import SHAPES, Shape, rollouts, step

GENERAL: list[Shape] = [(5, 4, "red"), (7, 6, None), (3, 9, "blue"), (11, 2, None)]


def token_losses(engine: Any, data: Any, shapes: list[Shape], name: str) -> list[Tensor]:
    """Each answer's token losses, from plain forwards of teacher and student."""
    model, loss, topk = tiny_model(), get_loss(name), engine.settings.topk
    cartridge = engine.cartridge.prefix()
    found = []
    for row, (_, _, document) in enumerate(shapes):
        prompt = data["prompts"].unbind()[row].tolist()
        answer = data["responses"].unbind()[row].tolist()
        read = [] if document is None else engine.teacher.document_ids(document)
        teacher = plain_distributions(model, None, read + prompt, answer)
        student = plain_distributions(model, cartridge, prompt, answer)
        asked = top_ids(student, topk) if loss.asks else None
        found.append(loss(student, TeacherTopK.from_logits(teacher, topk, 1.0, asked)))
    return found


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_trains_on_what_it_is(build: Any, name: str) -> None:
    engine = build(loss=name, topk=7)
    data = rollouts(engine)
    expected = torch.cat(token_losses(engine, data, SHAPES, name))
    out = step(engine, data)
    assert sum(out["loss"]) == pytest.approx(float(expected.mean()), rel=1e-4)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_first_tokens_are_left_out_of_the_mean(build: Any, micro_batch: int) -> None:
    """Also where a micro-batch has no token left: its answer is of length 1."""
    engine = build(skip_first_tokens=3)
    data = rollouts(engine, micro_batch=micro_batch)
    kept = [each[3:] for each in token_losses(engine, data, SHAPES, "forward_kl_topk")]
    out = step(engine, data)
    assert sum(out["loss"]) == pytest.approx(float(torch.cat(kept).mean()), rel=1e-4)
    tokens = out["metrics"]["trained_tokens/document"]
    assert tokens == [float(sum(len(each) for each in kept))]
    assert sum(out["metrics"]["response_tokens"]) == sum(length for _, length, _ in SHAPES)


def test_nothing_left_to_train_on_is_an_error(build: Any) -> None:
    engine = build(skip_first_tokens=16)
    with pytest.raises(RolloutError, match="skip_first_tokens=16 .* longest answer .* 16 tokens"):
        step(engine, rollouts(engine))


def test_a_bound_on_a_tokens_loss_is_counted(build: Any) -> None:
    engine = build()
    data = rollouts(engine)
    free = torch.cat(token_losses(engine, data, SHAPES, "forward_kl_topk"))
    lower, upper = free.sort().values[len(free) * 3 // 4 :][:2]
    bound = float(lower + upper) / 2  # between two: rounding does not decide
    bounded = build(max_token_loss=bound)
    out = step(bounded, rollouts(bounded))
    over = float((free > bound).float().mean())
    assert out["metrics"]["loss_clipped"] == [pytest.approx(over)] and over > 0
    assert sum(out["loss"]) == pytest.approx(float(free.clamp(max=bound).mean()), rel=1e-4)


@pytest.mark.parametrize("by_teacher", [(), (0, 1)])
def test_the_teacher_of_a_general_row_is_the_bare_model(
    build: Any, by_teacher: tuple[int, ...]
) -> None:
    engine = build()
    data = rollouts(engine, shapes=GENERAL, by_teacher=by_teacher)
    expected = token_losses(engine, data, GENERAL, "forward_kl_topk")
    out = step(engine, data)
    assert sum(out["loss"]) == pytest.approx(float(torch.cat(expected).mean()), rel=1e-4)
    metrics = out["metrics"]
    for kind, rows in (("document", (0, 2)), ("general", (1, 3))):
        losses = torch.cat([expected[row] for row in rows])
        assert metrics[f"trained_tokens/{kind}"] == [float(len(losses))]
        assert metrics[f"loss_{kind}"] == [pytest.approx(float(losses.mean()), rel=1e-4)]


def test_without_general_rows_there_is_no_number_of_them(build: Any) -> None:
    engine = build()
    metrics = step(engine, rollouts(engine))["metrics"]
    assert "loss_general" not in metrics and metrics["trained_tokens/general"] == [0.0]


def test_a_row_without_a_document_and_without_the_label_stays_an_error(build: Any) -> None:
    from verl.utils import tensordict_utils as tu

    engine = build()
    data = rollouts(engine, shapes=GENERAL)
    for info, problem in (
        ({"kind": "started"}, "no 'document_id'"),
        ({"kind": "general", "document_id": "red"}, "labelled 'general' and names the document"),
    ):
        rows = [{"document_id": "red"}, {"document_id": "red"}, {"document_id": "blue"}, info]
        tu.assign_non_tensor_stack(data, "extra_info", rows)
        with pytest.raises(DocumentError, match=problem):
            step(engine, data)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_entropy_and_overlap_are_means_over_tokens(build: Any, micro_batch: int) -> None:
    engine = build(topk=20)
    data = rollouts(engine, micro_batch=micro_batch)
    model, cartridge = tiny_model(), engine.cartridge.prefix()
    entropies, overlaps, masses = [], [], []
    for row, (_, _, document) in enumerate(SHAPES):
        prompt = data["prompts"].unbind()[row].tolist()
        answer = data["responses"].unbind()[row].tolist()
        assert document is not None
        read = engine.teacher.document_ids(document) + prompt
        teacher = plain_distributions(model, None, read, answer)
        student = plain_distributions(model, cartridge, prompt, answer)
        for p, q in zip(teacher.exp(), student.exp(), strict=True):
            shared = set(p.topk(20).indices.tolist()) & set(q.topk(20).indices.tolist())
            overlaps.append(len(shared) / 20)
            masses.append(float(sum(p[i] + q[i] for i in shared)) / 2)
            entropies.append(float(-(q * q.log()).sum()))
    metrics = step(engine, data)["metrics"]
    for name, values in (
        ("student_entropy", entropies),
        ("topk_overlap", overlaps),
        ("topk_overlap_mass", masses),
    ):
        assert metrics[name] == [pytest.approx(sum(values) / len(values), rel=1e-3)]
