"""How threads wait is set once, and never over what a user says."""

from __future__ import annotations

from cartridge_distill.util.openmp import SPINNING, spinning


def test_set_where_nothing_is() -> None:
    assert spinning({"PATH": "/bin"}) == SPINNING


def test_what_a_user_says_stays_alone() -> None:
    # Half of ours beside half of theirs would be neither.
    assert spinning({"OMP_WAIT_POLICY": "PASSIVE"}) == {}
