"""The engine with ``async_steps``: each sample is held against the version that wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from transformers import PreTrainedModel

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.util.errors import OffPolicyError
from tests.tiny import tiny_model
from tests.verl.engine_rig import Shape, rollouts, step

AHEAD = 2


@pytest.fixture
def build(build: Any) -> Any:
    return partial(build, async_steps=AHEAD, async_check_fraction=1.0)


def taken(engine: Any) -> Prefix:
    """The cartridge as it is now, whatever the optimizer does later."""
    prefix = engine.cartridge.prefix()
    return Prefix(
        *([part.detach().clone() for part in some] for some in (prefix.keys, prefix.values))
    )


def trained_to(engine: Any, version: int, **rollout: Any) -> list[Prefix]:
    """Strict steps; the cartridges of all versions up to this one."""
    versions = [taken(engine)]
    for number in range(version):
        step(engine, rollouts(engine, number, **rollout))
        versions.append(taken(engine))
    return versions


def written_by(
    engine: Any,
    versions: Sequence[Prefix],
    steps: Sequence[int],
    labels: Sequence[int] | None = None,
    **rollout: Any,
) -> TensorDict:
    """A batch whose row r is of version ``steps[r]``.

    Args:
        labels: what the rows say of themselves, where that is not the truth.
    """
    served = [versions[number] for number in steps]
    return rollouts(engine, 7, served=served, versions=labels or steps, **rollout)


def refused(engine: Any, data: TensorDict, message: str) -> None:
    before, at = {k: v.clone() for k, v in engine.cartridge.state_dict().items()}, engine.step
    with pytest.raises(OffPolicyError, match=message):
        step(engine, data)
    assert engine.step == at
    assert all(torch.equal(v, before[k]) for k, v in engine.cartridge.state_dict().items())


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_samples_of_the_last_versions_train_as_they_are(build: Any, micro_batch: int) -> None:
    """Of three versions and of the teacher in one batch: each agrees with whoever wrote it."""
    engine = build()
    versions = trained_to(engine, 3)
    data = written_by(engine, versions, [1, 3, 3, 2], by_teacher=[2], micro_batch=micro_batch)
    metrics = step(engine, data)["metrics"]
    assert max(metrics["logprob_diff/max"]) < 1e-5
    assert metrics["staleness_max"] == [2.0]
    assert metrics["seconds/version_check"][0] > 0
    assert (engine.step, engine.version) == (4, 4)


def test_the_gradient_is_that_of_the_samples_whoever_wrote_them(build: Any) -> None:
    """Only the proof differs: the loss is of the cartridge that is trained."""
    ahead, strict = build(), build(async_steps=0, max_logprob_diff=100.0)
    versions = trained_to(ahead, 3)
    trained_to(strict, 3)
    data = written_by(ahead, versions, [1, 3, 2, 2])
    expected = written_by(ahead, versions, [1, 3, 2, 2], labels=[3, 3, 3, 3])
    found, reference = (
        step(engine, batch)["metrics"]["grad_norm"]
        for engine, batch in ((ahead, data), (strict, expected))
    )
    assert found == reference


def test_a_version_that_is_too_old_is_refused(build: Any) -> None:
    engine = build()
    versions = trained_to(engine, 3)
    refused(
        engine,
        written_by(engine, versions, [3, 0, 2, 1]),
        r"step \[0\] reached the trainer at step 3; .*async_steps=2 takes steps 1 to 3",
    )
    refused(engine, written_by(engine, versions, [3, 3, 3, 3], [3, 4, 3, 3]), r"step \[4\] reached")
    step(engine, written_by(engine, versions, [1, 1, 1, 1]))  # and a sound batch still trains


@pytest.mark.parametrize(
    ("truth", "said"), [(2, 1), (1, 2), (3, 2), (2, 3)], ids=["newer", "older", "now", "not now"]
)
def test_another_versions_logprobs_are_refused(build: Any, truth: int, said: int) -> None:
    """The label is within the bound, and the numbers are of a neighbour."""
    engine = build()
    versions = trained_to(engine, 3)
    data = written_by(engine, versions, [3, truth, 3, 3], [3, said, 3, 3])
    refused(engine, data, "server and trainer disagree .* written by the student")


def test_a_part_of_the_batch_is_drawn_anew_at_each_step(build: Any) -> None:
    """At most so many rows behind their own cartridge, at least one, and not always the same."""
    engine = build(async_check_fraction=0.3)
    versions = trained_to(engine, 1)
    drawn = []
    own = engine.own_versions._logprobs
    engine.own_versions._logprobs = lambda samples, rows, number: (
        drawn.append(list(rows)) or own(samples, rows, number)  # type: ignore[func-returns-value]
    )
    for _ in range(12):
        step(engine, written_by(engine, versions, [engine.version - 1] * 4, micro_batch=4))
        versions.append(taken(engine))
    assert {len(rows) for rows in drawn} == {2}  # 0.3 of 4, rounded up
    assert len({tuple(rows) for rows in drawn}) > 2


def test_one_wrong_sample_is_found_in_the_end(build: Any) -> None:
    """A server that is behind with a quarter of its answers does not come far."""
    engine = build(async_check_fraction=0.25)
    versions = trained_to(engine, 2)
    with pytest.raises(OffPolicyError, match="disagree"):
        for _ in range(30):
            at = engine.version
            truth = [at - 1, at - 1, at - 2, at - 1]
            step(engine, written_by(engine, versions, truth, [at - 1] * 4, micro_batch=4))
            versions.append(taken(engine))


def test_after_a_resume_nothing_older_is_known(build: Any, tmp_path: Any) -> None:
    """The run that wrote it is dead; its versions are named by another run id."""
    engine = build()
    versions = trained_to(engine, 3)
    engine.save_checkpoint(str(tmp_path / "actor"), global_step=3)
    resumed = build()
    resumed.load_checkpoint(str(tmp_path / "actor"))
    refused(
        resumed, written_by(resumed, versions, [3, 2, 3, 3]), "older than this start of the run"
    )
    step(resumed, written_by(resumed, versions, [3, 3, 3, 3]))
    versions.append(taken(resumed))
    step(resumed, written_by(resumed, versions, [3, 4, 3, 3]))


def test_strict_mode_keeps_nothing(build: Any) -> None:
    engine = build(async_steps=0)
    trained_to(engine, 2)
    assert not engine.checks.kept._kept
    assert "seconds/version_check" not in step(engine, rollouts(engine))["metrics"]


ROWS: list[Shape] = [(7 + row, 16, "red" if row % 2 else "blue") for row in range(12)]


@pytest.fixture(scope="module")
def server() -> PreTrainedModel:
    return tiny_model().to(torch.bfloat16)


def test_where_both_round_each_version_is_told_from_the_one_before(
    build: Any, server: PreTrainedModel
) -> None:
    engine = build(dtype="bfloat16", max_logprob_diff=None)
    rounding: dict[str, Any] = {"shapes": ROWS, "server": server, "micro_batch": 12}
    versions = trained_to(engine, 3, shapes=ROWS, server=server)
    data = written_by(engine, versions, [2] * 6 + [3] * 6, **rounding)
    metrics = step(engine, data)["metrics"]
    assert metrics["logprob_diff/version_decided"] == [1.0]
    assert abs(metrics["logprob_diff/stale_coefficient"][0]) < 0.2
    assert metrics["logprob_diff/scaled_mean"][0] < metrics["logprob_diff/scaled_mean_bound"][0]
    versions.append(taken(engine))
    behind = written_by(engine, versions, [2] * 12, [3] * 12, **rounding)
    refused(engine, behind, "labelled step 3 were made, all or some, by the version before")
    oldest = written_by(engine, versions, [1] * 12, [2] * 12, **rounding)
    refused(engine, oldest, "labelled step 2 were made, all or some, by the version before")
