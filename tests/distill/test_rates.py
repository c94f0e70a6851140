"""Warm-up and straight decay: every step of a run, by hand."""

from __future__ import annotations

import pytest

from cartridge_distill.distill.rates import warmed_and_decayed
from cartridge_distill.util.errors import ConfigError


def test_every_step_by_hand() -> None:
    factor = warmed_and_decayed(3, 8, 0.2)
    expected = [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]
    assert [factor(step) for step in range(9)] == pytest.approx(expected)


def test_without_a_warm_up_it_begins_at_the_full_rate() -> None:
    factor = warmed_and_decayed(0, 5, 0.0)
    assert [factor(step) for step in range(6)] == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])


def test_a_single_step_has_the_full_rate() -> None:
    assert warmed_and_decayed(0, 1, 0.02)(0) == 1.0


def test_a_warm_up_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="lr_warmup_steps=8 of 8 steps"):
        warmed_and_decayed(8, 8, 0.02)
