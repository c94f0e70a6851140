"""Rows, batch, epochs, steps and saving: what is refused, and that the fix is right."""

from __future__ import annotations

import re
from typing import Any

import pytest

from verl_patches.config.run_length import EPOCHS, STEPS, RunLength


def length(**settings: Any) -> RunLength:
    good = {"rows": 64, "val_rows": 4, "batch": 8, "epochs": 1, "steps": None, "save_every": 50}
    return RunLength(**(good | settings))


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        ({}, 8),
        ({"epochs": 3}, 24),
        ({"rows": 71}, 8),  # seven rows of the epoch are left out
        ({"steps": 8}, 8),
        ({"steps": 3, "epochs": 100}, 3),
        ({"rows": 8}, 1),
        ({"rows": None}, None),
        ({"rows": None, "steps": 5}, 5),
    ],
)
def test_the_step_that_a_run_ends_with(settings: dict[str, Any], last: int | None) -> None:
    assert length(**settings).problems() == []
    assert length(**settings).last_step == last


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rows": 7}, "7 rows, data.train_batch_size=8: that is not one step"),
        ({"rows": 0}, "0 rows"),
        ({"val_rows": 0}, "data.val_files has no rows"),
        ({"rows": 16, "steps": 6}, "total_training_steps=6, but the run would end after 2"),
        ({"rows": 16, "steps": 6, "epochs": 2}, "would end after 4"),
        ({"batch": 0}, "data.train_batch_size=0"),
        ({"batch": 2.5}, "data.train_batch_size=2.5"),
        ({"epochs": None}, "trainer.total_epochs=None"),
        ({"epochs": True}, "trainer.total_epochs=True"),
        ({"steps": 0}, "trainer.total_training_steps=0"),
        ({"save_every": 0}, "trainer.save_freq=0"),
        ({"save_every": None}, "trainer.save_freq=None"),
    ],
)
def test_what_cannot_end_with_the_step_asked_for(settings: dict[str, Any], said: str) -> None:
    [problem] = length(**settings).problems()
    assert said in problem


def test_each_way_out_that_is_named_is_one() -> None:
    wrong = {"rows": 21, "steps": 6}
    [problem] = length(**wrong).problems()
    for name, key in (("epochs", EPOCHS), ("steps", STEPS)):
        [value] = re.findall(rf"(?:set|or) {re.escape(key)}=(\d+)", problem)
        assert length(**(wrong | {name: int(value)})).problems() == []
    [rows] = re.findall(r"prepare (\d+) rows", problem)
    assert length(**(wrong | {"rows": int(rows)})).problems() == []


def test_every_wrong_number_is_named_at_once() -> None:
    assert len(length(batch=-1, epochs=0, steps="six", save_every=0).problems()) == 4
