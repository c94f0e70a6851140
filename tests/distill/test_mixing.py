"""Who writes which sample: the schedule, the choice, the counts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from omegaconf import OmegaConf

from cartridge_distill.distill.mixing import Schedule, TokenCounts, answer_seed, student_writes
from cartridge_distill.util.errors import ConfigError

RAMP = [[4, 0.0], [8, 0.5], [10, 1.0]]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, {0: 1.0, 7: 1.0}),
        (0, {1: 0.0, 900: 0.0}),
        (RAMP, {0: 0.0, 4: 0.0, 6: 0.25, 8: 0.5, 9: 0.75, 10: 1.0, 99: 1.0}),
        (OmegaConf.create(RAMP), {6: 0.25, 99: 1.0}),  # as Hydra hands it over
        (((3, 0.2),), {0: 0.2, 3: 0.2, 4: 0.2}),
        ("cold_start", {1: 0.0, 16: 0.0, 24: 0.5, 32: 1.0, 99: 1.0}),
        ("cold_start:2", {1: 0.0, 2: 0.0, 3: 0.5, 4: 1.0}),
    ],
)
def test_a_schedule_has_a_fraction_for_every_step(value: Any, expected: dict[int, float]) -> None:
    schedule = Schedule.of(value)
    assert {step: schedule.at(step) for step in expected} == pytest.approx(expected)


def test_the_teacher_is_needed_where_any_step_has_a_part_for_it() -> None:
    assert not Schedule.of(1).needs_teacher
    assert not Schedule.of([[0, 1.0], [8, 1.0]]).needs_teacher
    assert Schedule.of(RAMP).needs_teacher and Schedule.of(0.99).needs_teacher


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (1.01, "fraction 1.01 .*; fix: set a number from 0 to 1"),
        (float("nan"), "fraction nan"),
        (True, "set a number from 0"),
        (None, "set a number from 0"),
        ("0.5", "set a number from 0"),
        ("cold_start:", "set a number from 0"),
        ("cold_start:-3", "set a number from 0"),
        ("cold_start:0", "of 0 steps .*; fix: give 1 or more"),
        ([], "set a number from 0"),
        ([0, 1], "0 is no pair; fix: write .step, fraction"),
        ([[0, 0.0, 1.0]], "is no pair; fix: write .step, fraction"),
        ([["0", 0.0]], "step '0' .*; fix: set whole numbers"),
        ([[-1, 0.0]], "step -1 .*; fix: set whole numbers"),
        ([[0.5, 0.0]], "step 0.5 .*; fix: set whole numbers"),
        ([[0, 2]], "fraction 2 .*; fix: set a number from 0 to 1"),
        ([[4, 0.0], [4, 1.0]], "step 4 after step 4; fix: let the steps increase"),
    ],
)
def test_nonsense_is_refused(value: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Schedule.of(value)


def test_the_choice_is_exact_repeatable_and_spread() -> None:
    for fraction in (0.0, 0.1, 0.5, 0.77, 1.0):
        chosen = student_writes(0, 3, 48, fraction)
        assert sum(chosen) == round(fraction * 48)
        assert chosen == student_writes(0, 3, 48, fraction)
    half = student_writes(0, 3, 48, 0.5)
    assert half != student_writes(0, 4, 48, 0.5)  # another step
    assert half != student_writes(1, 3, 48, 0.5)  # another seed
    more = student_writes(0, 3, 48, 0.6)
    assert all(later for sooner, later in zip(half, more, strict=True) if sooner)
    # over the steps nobody is left out
    often = [
        sum(row) for row in zip(*(student_writes(0, s, 48, 0.5) for s in range(200)), strict=True)
    ]
    assert 60 < min(often) and max(often) < 140


def test_seeds_of_answers_differ_in_each_part() -> None:
    seeds = {
        answer_seed(seed, row, epoch, choice)
        for seed in (None, 0, 1)
        for row in range(20)
        for epoch in range(3)
        for choice in range(4)
    }
    assert len(seeds) == 3 * 20 * 3 * 4
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert answer_seed(0, 5, 1, 2) == answer_seed(0, 5, 1, 2)


def test_counts_add_up_and_come_back() -> None:
    one, two = TokenCounts(1, 2, 3, 4), TokenCounts(trained=10)
    assert one + two == TokenCounts(1, 2, 3, 14)
    assert TokenCounts.from_saved(asdict(one)) == one
    assert (one + two).metrics("tokens/total_")["tokens/total_trained"] == 14
