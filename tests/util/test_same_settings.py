"""A run goes on only from what was made with its own settings."""

from __future__ import annotations

import pytest

from cartridge_distill.util.same_settings import OtherSettings, check_same_settings


def test_tuples_are_the_lists_that_a_file_has() -> None:
    check_same_settings({"points": [[0, 1.0]], "seed": 3}, {"seed": 3, "points": ((0, 1.0),)}, "no")


def test_every_other_setting_is_named_with_both_values() -> None:
    with pytest.raises(OtherSettings, match="cannot go on") as refused:
        check_same_settings(
            {"lr": 0.02, "seed": 0}, {"lr": 0.01, "new": None, "k": 5}, "cannot go on"
        )
    assert refused.value.names == ["k", "lr", "seed"]
    assert "- lr: 0.02 there, 0.01 now" in str(refused.value)
    assert "- k: None there, 5 now" in str(refused.value)
