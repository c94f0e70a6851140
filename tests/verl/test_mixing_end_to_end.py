"""Whole runs that go from off- to on-policy: real veRL, real HTTP, answers kept on disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from tests.verl.authors import Asked, check_counts
from tests.verl.world import ROWS, STEPS, World, as_it_was_after

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

TOTAL = STEPS + 1  # the last step is in the data's second pass
BY_STUDENT = [0, 1, 3, 4]  # of ROWS = 4, on a straight line from 0 to 1
SETTINGS = [
    "actor_rollout_ref.actor.cartridge.init=random",
    "actor_rollout_ref.actor.cartridge.on_policy_fraction=[[1,0.0],[4,1.0]]",
    f"trainer.total_training_steps={TOTAL}",
    "trainer.total_epochs=2",
    "trainer.save_freq=1",
]


def test_a_run_goes_from_off_to_on_policy_until_the_server_serves_an_old_version(
    world: World,
    asked: Asked,
) -> None:
    asked.stale_from = TOTAL
    status, log = world.run(*SETTINGS, f"trainer.total_training_steps={TOTAL + 1}")
    assert status != 0
    assert re.search("OffPolicyError.*server and trainer disagree", log), log[-4000:]
    assert len(world.metrics) == TOTAL  # nothing was trained on it, and nothing saved
    saved = [folder.name for folder in (world.folder / "checkpoints").glob("global_step_*")]
    assert f"global_step_{TOTAL}" in saved and f"global_step_{TOTAL + 1}" not in saved
    before: dict[str, Any] = {}
    for step, by_student in zip(world.metrics, BY_STUDENT, strict=True):
        check_counts(step, before, by_student)
        assert step["actor/logprob_diff/max"] < 1e-3
        # the teacher's answers were compared with the teacher's forward
        assert ("actor/logprob_diff/teacher_max" in step) == (by_student < ROWS)
        assert step["actor/loss"] > 0.01 and step["actor/frozen_tokens_changed"] == 0
        before = step
    assert [step["actor/on_policy_fraction"] for step in world.metrics] == [0, 0.25, 0.75, 1]
    assert "by student 25%" in log
    assert len(asked.of_student) == sum(BY_STUDENT) + ROWS  # and those of the step that ended it
    assert len(asked.of_teacher) == TOTAL * ROWS - sum(BY_STUDENT)
    length = len(asked.document)
    assert all(body["prompt"][:length] == asked.document for body in asked.of_teacher)
    assert len({body["seed"] for body in asked.of_teacher}) == len(asked.of_teacher)
    assert not any(body["prompt"][:length] == asked.document for body in asked.of_student)
    assert len({body["seed"] for body in asked.of_student}) == len(asked.of_student)
    # every version was served all the same
    assert len(world.loaded()) == TOTAL + 1


@pytest.mark.long
def test_an_answer_without_its_document_ends_the_run(world: World, asked: Asked) -> None:
    """A server that drops the document is the bare base model; its answers look like any others."""

    def spoil(_: int, body: dict[str, Any]) -> httpx.Response | None:
        if not body["cartridges"]:
            body["prompt"] = body["prompt"][len(asked.document) :]
        return None

    world.proxy.spoil = spoil
    status, log = world.run("actor_rollout_ref.actor.cartridge.on_policy_fraction=0.5")
    assert status != 0
    assert "written by the teacher" in log and "without the document" in log, log[-4000:]
    assert world.metrics == []


@pytest.mark.long
@pytest.mark.timeout(600)  # two runs
def test_a_resumed_run_counts_on_and_finds_its_answers(
    world: World,
    asked: Asked,
    tmp_path: Path,
) -> None:
    cache = f"actor_rollout_ref.actor.cartridge.teacher_cache={tmp_path}/answers"
    status, log = world.run(*SETTINGS, cache)
    assert status == 0, log[-4000:]
    whole = world.metrics
    assert sum(step["teacher_answers/cache_misses"] for step in whole) == len(asked.of_teacher) == 8
    assert len(list((tmp_path / "answers").rglob("*.json"))) == 8

    stopped = as_it_was_after(world.folder / "checkpoints", 2, world.folder / "stopped")
    (world.folder / "metrics.jsonl").unlink()
    status, log = world.run(*SETTINGS, cache, f"trainer.default_local_dir={stopped}")
    assert status == 0, log[-4000:]
    assert len(asked.of_teacher) == 8  # nothing was written again
    # the log was gone: the steps before have the numbers that were saved with them
    assert [step["tokens/total_trained"] for step in world.metrics[:2]] == [
        step["tokens/total_trained"] for step in whole[:2]
    ]
    before = whole[1]
    for step, by_student in zip(world.metrics[2:], BY_STUDENT[2:], strict=True):
        check_counts(step, before, by_student)
        assert step["teacher_answers/cache_hits"] == ROWS - by_student
        before = step
