"""veRL's schedule, warm-up, clipping and weight decay reach the cartridge, in float32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from verl.utils import tensordict_utils as tu

from cartridge_distill.distill.token_loss import TokenLoss
from cartridge_distill.util.errors import OffPolicyError
from tests.verl.engine_rig import rollouts, step
from verl_patches.hooks import distill_loss

LR = 0.02


def trained(engine: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in engine.cartridge.trainable_parameters()]


def moved(engine: Any, before: list[torch.Tensor]) -> float:
    """The largest change of an element."""
    pairs = zip(before, trained(engine), strict=True)
    return max(float((after - start).abs().max()) for start, after in pairs)


def cosine(number: int, warmup: int, total: int, floor: float) -> float:
    """The rate of optimizer step ``number``, as a part of the full one."""
    if number < warmup:
        return number / warmup
    progress = (number - warmup) / (total - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ({"lr_warmup_steps": 4}, [number / 4 for number in range(4)] + [1.0] * 6),
        ({"lr_warmup_steps_ratio": 0.2}, [0.0, 0.5] + [1.0] * 8),
        (
            {"lr_scheduler_type": "cosine", "lr_warmup_steps": 2, "min_lr_ratio": 0.1},
            [cosine(number, 2, 10, 0.1) for number in range(10)],
        ),
        (
            {"lr_warmup_steps": 2, "lr_decay_to": 0.3},
            [1 / 3, 2 / 3] + [1 - 0.7 * number / 7 for number in range(8)],
        ),
    ],
    ids=["warm-up", "warm-up by ratio", "cosine", "straight down"],
)
def test_the_rate_follows_the_schedule_and_so_does_the_cartridge(
    build: Any, optim: dict[str, Any], expected: list[float]
) -> None:
    """``actor.optim.lr`` is 1.0 in the rig: the cartridge's own rate is what counts.

    Adam's first moves are close to the rate itself, so a rate of zero must not move anything.
    """
    cartridge = {name: optim[name] for name in optim if name == "lr_decay_to"}
    own = {name: value for name, value in optim.items() if name not in cartridge}
    engine = build(optim=own, **cartridge)
    for number, part in enumerate(expected):
        rate = engine.optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(LR * part, abs=1e-9), number
        before = trained(engine)
        out = step(engine, rollouts(engine, number))
        following = expected[number + 1] if number + 1 < len(expected) else None
        if following is not None:  # veRL logs the rate of the step to come
            assert out["metrics"]["lr"] == pytest.approx(LR * following, abs=1e-9)
        change = moved(engine, before)
        assert change == 0 if part == 0 else 0.2 * rate < change < 4 * rate, number


def test_clipping_bounds_the_update(build: Any) -> None:
    """With plain gradient descent the change is rate x clipped gradient, so it can be measured."""
    bound = 1e-3

    def update(clip: float) -> tuple[float, float]:
        engine = build(
            optim={"optimizer": "SGD", "clip_grad": clip}, init="random", init_document=None
        )
        before = trained(engine)
        norm = step(engine, rollouts(engine))["metrics"]["grad_norm"]
        pairs = zip(before, trained(engine), strict=True)
        return norm, math.sqrt(sum(float((b - a).square().sum()) for a, b in pairs))

    norm, change = update(bound)
    assert norm > 5 * bound  # reported before clipping
    assert change == pytest.approx(LR * bound, rel=1e-3)
    free_norm, free_change = update(1e6)
    assert free_norm == norm
    assert free_change == pytest.approx(LR * norm, rel=1e-3)


def test_weight_decay_shrinks_the_trained_tokens_alone(build: Any) -> None:
    """The first step of two engines that differ by the decay: it must be all that differs."""
    engines = [build(optim={"weight_decay": decay}) for decay in (0.0, 0.5)]
    start = trained(engines[0])
    for engine in engines:
        frozen = [p.detach().clone() for p in engine._frozen_tokens()]
        base = [p.detach().clone() for p in engine.module.parameters()]
        step(engine, rollouts(engine))
        assert all(map(torch.equal, frozen, engine._frozen_tokens()))
        assert all(map(torch.equal, base, engine.module.parameters()))
    plain, decayed = map(trained, engines)
    for initial, without, with_decay in zip(start, plain, decayed, strict=True):
        torch.testing.assert_close(without - with_decay, LR * 0.5 * initial, atol=1e-6, rtol=1e-3)


def test_bfloat16_computes_and_float32_remembers(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(dtype="bfloat16", max_logprob_diff=0.5)
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
    seen: list[torch.dtype] = []
    original = TokenLoss.__call__

    def spy(loss: TokenLoss, logits: torch.Tensor, *rest: Any) -> Any:
        seen.append(logits.dtype)
        return original(loss, logits, *rest)

    monkeypatch.setattr(TokenLoss, "__call__", spy)
    first = sum(step(engine, rollouts(engine))["loss"])
    parameters = engine.cartridge.trainable_parameters()
    engine.forward_backward_batch(rollouts(engine), distill_loss)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in engine.cartridge.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in parameters} == {torch.float32}
    state = [value for p in parameters for value in engine.optimizer.state[p].values()]
    assert {value.dtype for value in state} == {torch.float32}
    # Updates far below bfloat16's resolution add up in the master weights: 2**-8 of a key of
    # about 1 is 0.004, a step here moves it by 1e-5.
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-5
    before = trained(engine)
    step(engine, rollouts(engine))
    assert 1e-6 < moved(engine, before) < 1e-4
    full = build(dtype="float32")
    assert first == pytest.approx(sum(step(full, rollouts(full))["loss"]), rel=0.05)


def test_two_optimizer_steps_on_a_batch(build: Any) -> None:
    """Allowed by ``max_staleness=1``: the second half is one step off, and says so."""
    engine = build(max_staleness=1)
    halves = [rollouts(engine, take=rows) for rows in ([0, 1], [2, 3])]
    before = trained(engine)
    out = step(engine, *halves)
    assert (engine.step, engine.version) == (2, 1)
    assert out["metrics"]["staleness_max"] == [1.0]
    assert max(out["metrics"]["stale_logprob_diff/max"]) > 1e-3  # the cartridge moved meanwhile
    assert moved(engine, before) > LR
    fresh = step(engine, rollouts(engine, 1, take=[0, 1]), rollouts(engine, 1, take=[2, 3]))
    assert fresh["metrics"]["staleness_max"] == [1.0]
    assert (engine.step, engine.version) == (4, 2)


def test_the_teachers_answers_do_not_get_stale(build: Any) -> None:
    """The second half is off from the student's rollouts, and as close to the teacher's answers."""
    engine = build(max_staleness=1)
    first = rollouts(engine, take=[0, 1])
    out = step(engine, first, rollouts(engine, take=[2, 3], by_teacher=[3]))
    assert max(out["metrics"]["stale_logprob_diff/max"]) > 1e-3
    assert max(out["metrics"]["logprob_diff/teacher_max"]) < 1e-5
    wrong = rollouts(engine, take=[2, 3])  # the student's, under the teacher's name
    tu.assign_non_tensor_stack(wrong, "extra_fields", [{"author": "teacher"}] * 2)
    with pytest.raises(OffPolicyError, match="written by the teacher"):
        step(engine, rollouts(engine, take=[0, 1]), wrong)


def test_a_second_optimizer_step_that_nobody_asked_for_is_refused(build: Any) -> None:
    engine = build()
    halves = [rollouts(engine, take=rows) for rows in ([0, 1], [2, 3])]
    with pytest.raises(OffPolicyError, match="max_staleness=0"):
        step(engine, *halves)
    assert (engine.step, engine.version) == (1, 0)


def test_a_stale_half_of_another_version_is_refused(build: Any) -> None:
    """Off-policy by steps on one batch is one thing, rollouts of another version another."""
    engine = build(max_staleness=1)
    old = rollouts(engine, take=[2, 3])
    step(engine, rollouts(engine))
    with pytest.raises(OffPolicyError, match=r"step \[0\] reached the trainer at step 1"):
        step(engine, rollouts(engine, take=[0, 1]), old)


def test_gradient_checkpointing_trains_the_same(build: Any) -> None:
    """To the bit, and the layers do run again."""
    plain, recomputing = build(), build(gradient_checkpointing=True)
    ran = []
    first = recomputing.module.model.layers[0]
    first.input_layernorm.register_forward_hook(lambda *_: ran.append(1))
    for number in range(2):
        ran.clear()
        out = [step(engine, rollouts(engine, number)) for engine in (plain, recomputing)]
        assert out[0]["metrics"]["grad_norm"] == out[1]["metrics"]["grad_norm"]
        # two micro-batches: student, student again; and the teacher, once a document in each, and
        # for each document when it is first read
        assert len(ran) == 2 * 2 + 4 + (2 if number == 0 else 0)
    assert all(map(torch.equal, trained(plain), trained(recomputing)))
    assert not recomputing.module.training
