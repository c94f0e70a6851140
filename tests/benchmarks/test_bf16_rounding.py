"""The command line of ``benchmarks/bf16_rounding.py``; its experiment: ``test_rounding.py``."""

from __future__ import annotations

import pytest

from benchmarks.bf16_rounding import main, parse
from benchmarks.planted_servers import Outcome, cosine


@pytest.mark.parametrize("name", ["--steps", "--prompts", "--response", "--every"])
def test_nothing_to_do_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "0"])
    assert f"{name} 0: must be at least 1" in capsys.readouterr().err


def test_the_demos_recipe_is_the_default() -> None:
    options = parse([])
    assert (options.steps, options.prompts, options.response, options.lr) == (36, 48, 6, 0.03)
    assert cosine(0, 36) == 1.0 and cosine(36, 36) == pytest.approx(0.1)


def test_an_outcome_counts_what_was_refused() -> None:
    assert Outcome(refused=[None, "why", None]).count == 1
