"""The engine in bfloat16 with ``max_logprob_diff=null``: what it refuses, and what it trains on.

The server is the tiny model in bfloat16, one sequence at a time with transformers' own attention:
its numbers are rounded otherwise than the engine's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.util.errors import OffPolicyError
from tests.tiny import random_cartridge, tiny_model
from tests.verl.engine_rig import TEMPERATURE, Shape, rollouts, step

SHAPES: list[Shape] = [(7 + row, 16, "red" if row % 2 else "blue") for row in range(12)]


@pytest.fixture
def engine(build: Any) -> Any:
    return build(dtype="bfloat16", max_logprob_diff=None)


@pytest.fixture(scope="module")
def server() -> PreTrainedModel:
    return tiny_model().to(torch.bfloat16)


def taken(engine: Any) -> Prefix:
    """The cartridge as it is now, whatever the optimizer does later."""
    prefix = engine.cartridge.prefix()
    return Prefix([k.detach().clone() for k in prefix.keys], [v.detach() for v in prefix.values])


def refused(engine: Any, message: str, **rollout: Any) -> None:
    """A batch that the engine does not train on."""
    before = {k: v.clone() for k, v in engine.cartridge.state_dict().items()}
    with pytest.raises(OffPolicyError, match=message):
        step(engine, rollouts(engine, shapes=SHAPES, micro_batch=len(SHAPES), **rollout))
    assert all(torch.equal(v, before[k]) for k, v in engine.cartridge.state_dict().items())
    assert all(p.grad is None for p in engine.cartridge.trainable_parameters())


def test_a_healthy_server_trains_and_its_version_is_told(
    engine: Any, server: PreTrainedModel
) -> None:
    for seed in range(4):
        out = step(engine, rollouts(engine, seed, SHAPES, server=server, micro_batch=6))
        metrics = out["metrics"]
        means = metrics["logprob_diff/scaled_mean"]
        assert len(means) == 2
        assert max(means) < min(metrics["logprob_diff/scaled_mean_bound"]) / 1.5
        assert max(metrics["logprob_diff/scaled_q95"]) < min(
            metrics["logprob_diff/scaled_q95_bound"]
        )
        assert max(metrics["logprob_diff/max"]) > 1e-3  # float32's bound would refuse it
        assert "logprob_diff/bound" not in metrics
        assert ("logprob_diff/version_decided" in metrics) == (seed > 0)
        if seed:
            assert metrics["logprob_diff/version_decided"] == [1.0]  # of the first micro-batch
            assert abs(metrics["logprob_diff/stale_coefficient"][0]) < 0.2
            assert out["metrics"]["seconds/version_check"][0] > 0
    assert engine.step == 4


@pytest.mark.parametrize("rate", [0.02, 0.002], ids=["full rate", "a tenth of it"])
def test_the_version_before_is_refused(engine: Any, server: PreTrainedModel, rate: float) -> None:
    step(engine, rollouts(engine, 0, SHAPES, server=server))
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    before = taken(engine)
    step(engine, rollouts(engine, 1, SHAPES, server=server))
    refused(engine, "made, all or some, by the version before", server=server, served=before)
    half = [before, engine.cartridge.prefix()] * (len(SHAPES) // 2)
    if rate == 0.02:
        refused(engine, "stale coefficient 0.[3-7]", server=server, served=half)
    step(engine, rollouts(engine, 2, SHAPES, server=server))  # and the right one still trains


def test_what_is_wrong_from_the_start_is_refused(engine: Any, server: PreTrainedModel) -> None:
    """The size of the rounding comes from the trainer alone: the server has no say in it."""
    wrong = "written by the student.*units of the logits.*this cartridge version"
    refused(engine, wrong, server=tiny_model(seed=1).to(torch.bfloat16))
    other = random_cartridge(server, 32, seed=5).prefix()
    refused(engine, wrong, server=server, served=other)
    refused(engine, wrong, server=server, temperature=1.0)
    mixed = [other if row % 6 == 0 else engine.cartridge.prefix() for row in range(len(SHAPES))]
    refused(engine, wrong, server=server, served=mixed)
    assert engine.step == 0
    step(engine, rollouts(engine, 0, SHAPES, server=server))


def test_the_teachers_answers_are_checked_at_their_temperature(
    build: Any, server: PreTrainedModel
) -> None:
    engine = build(dtype="bfloat16", max_logprob_diff=None, teacher_temperature=1.5)
    everyone = list(range(len(SHAPES)))
    for rows in ([1, 4], everyone):
        batch = rollouts(engine, 3, SHAPES, by_teacher=rows, server=server, teacher_temperature=1.5)
        step(engine, batch)
    refused(
        engine,
        "written by the teacher.*without the document",
        by_teacher=everyone,
        server=server,
        teacher_temperature=TEMPERATURE,
    )


def test_a_rounding_of_a_few_tokens_judges_nobody(engine: Any, server: PreTrainedModel) -> None:
    """Its size may be nothing by chance. It is measured on, until there are enough."""
    few: list[Shape] = [(9, 6, "red"), (7, 5, "blue")]
    for seed in range(2):
        metrics = step(engine, rollouts(engine, seed, few, server=server))["metrics"]
        assert metrics["logprob_diff/rounding_tokens"] == [11.0 * (seed + 1)]
        assert "logprob_diff/scaled_mean" not in metrics
    metrics = step(engine, rollouts(engine, 2, few, server=server))["metrics"]
    assert "logprob_diff/rounding_tokens" not in metrics
    assert metrics["logprob_diff/scaled_mean"][0] < metrics["logprob_diff/scaled_mean_bound"][0]


def test_a_first_micro_batch_without_a_token_that_counts(
    engine: Any, server: PreTrainedModel
) -> None:
    data = rollouts(engine, 0, SHAPES, server=server, micro_batch=1)
    masks = [mask.clone() for mask in data["response_mask"].unbind()]
    masks[0].zero_()
    data["response_mask"] = torch.nested.as_nested_tensor(masks, layout=torch.jagged)
    metrics = step(engine, data)["metrics"]
    assert all(torch.isfinite(torch.tensor(metrics["logprob_diff/mean"])))


def test_after_a_checkpoint_the_version_before_is_not_asked_about(
    engine: Any, server: PreTrainedModel, tmp_path: Any
) -> None:
    step(engine, rollouts(engine, 0, SHAPES, server=server))
    engine.save_checkpoint(str(tmp_path / "actor"), global_step=1)
    engine.load_checkpoint(str(tmp_path / "actor"))
    first = step(engine, rollouts(engine, 1, SHAPES, server=server))["metrics"]
    then = step(engine, rollouts(engine, 2, SHAPES, server=server))["metrics"]
    assert "logprob_diff/version_decided" not in first and "logprob_diff/version_decided" in then
