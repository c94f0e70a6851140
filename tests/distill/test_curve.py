"""The curve of a cartridge: thinned out the same way, however often the run was stopped."""

from __future__ import annotations

import pytest

from cartridge_distill.distill.curve import MOST_ROWS, row, thinned


@pytest.mark.parametrize("last", [1, 2, MOST_ROWS, MOST_ROWS + 1, 1000, 100_000])
def test_few_rows_from_the_first_step_to_the_last(last: int) -> None:
    rows = thinned([row(step, loss=1 / step) for step in range(1, last + 1)])
    steps = [r["step"] for r in rows]
    assert steps[0] == 1 and steps[-1] == last
    assert min(last, MOST_ROWS / 2) <= len(rows) <= MOST_ROWS + 1
    assert len({b - a for a, b in zip(steps[:-1], steps[1:-1], strict=False)}) <= 1  # even


@pytest.mark.parametrize("stops", [[], [300], [1, 128, 129, 130, 257, 700]])
def test_a_run_that_was_stopped_has_the_curve_of_the_one_that_was_not(stops: list[int]) -> None:
    rows: list[dict[str, float]] = []
    for step in range(1, 1001):
        rows.append(row(step, loss=float(step)))
        if step in stops:
            rows = thinned(rows)
    assert thinned(rows) == thinned([row(step, loss=float(step)) for step in range(1, 1001)])


def test_a_row_is_short() -> None:
    assert row(3, loss=1.23456789, grad_norm=0.1) == {"step": 3, "loss": 1.23457, "grad_norm": 0.1}
    assert thinned([]) == []
