"""The test of server against trainer where both round: its arithmetic, and a model that trains."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.planted_servers import BACK, BASE, CARTRIDGE, Experiment, World
from cartridge_distill.distill.rounding import (
    Rounding,
    StepLevel,
    VersionEvidence,
    level_figures,
    nudged,
    rounding_figures,
    scaled,
    version_figures,
)
from cartridge_distill.model.loading import prepare_model
from tests.tiny import VOCAB, random_cartridge, tiny_model

TOKENS = 400
NOISE = 0.07  # of one forward, in units of the logits: what SmolLM2-135M has in bfloat16


class Forwards:
    """Log-probs of tokens from nearly sure to unlikely, as forwards that round would give them."""

    def __init__(self, seed: int, tokens: int = TOKENS) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        probability = torch.rand(tokens, generator=self.generator).double() ** 0.25
        self.exact = probability.clamp(1e-4, 1 - 1e-4).log()
        self.direction = self.normal()

    def normal(self) -> Tensor:
        return torch.randn(len(self.exact), generator=self.generator).double()

    def of(self, moved: float = 0.0, noise: float = NOISE) -> Tensor:
        """The weights lie ``moved`` away, in units of the logits, always in one direction."""
        unsure = -torch.expm1(self.exact)
        return self.exact + unsure * (moved * self.direction + noise * self.normal())


def everything(values: Tensor) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool)


def measured(forwards: Forwards) -> Rounding:
    figures = rounding_figures(forwards.of(), forwards.of()).tolist()
    return Rounding.of(TOKENS, figures, torch.bfloat16)


def evidence(forwards: Forwards, moved: float, stale: float, seen: int = TOKENS) -> list[float]:
    """One step's figures; ``stale`` is the share of the tokens that the previous version wrote."""
    trainer, before = forwards.of(0.0, noise=1e-6), forwards.of(moved, noise=1e-6)
    server = torch.where(
        torch.arange(len(trainer)) < stale * len(trainer), forwards.of(moved), forwards.of()
    )
    counted = torch.arange(len(trainer)) < seen
    return version_figures(trainer, before, server, counted).tolist()


def test_scaled_differences_have_one_spread() -> None:
    forwards = Forwards(0, 20_000)
    size = scaled(forwards.of() - forwards.exact, forwards.exact)
    unsure = -torch.expm1(forwards.exact)
    for low, high in ((0.05, 0.2), (0.2, 0.5), (0.5, 1.0)):
        some = size[(unsure > low) & (unsure <= high)]
        assert some.pow(2).mean().sqrt() == pytest.approx(NOISE, rel=0.12)


def test_a_healthy_server_is_let_through_whatever_is_an_outlier() -> None:
    for seed in range(50):
        forwards = Forwards(seed)
        level, trainer, server = StepLevel(measured(forwards)), forwards.of(), forwards.of()
        server[seed] -= 0.9  # over any bound on the largest difference that is of use
        for part in range(0, TOKENS, 50):
            some = slice(part, part + 50)
            bound = torch.tensor(level.rounding.high_bound)
            figures = level_figures(trainer[some], server[some], everything(trainer[some]), bound)
            assert level.add(figures.tolist()) is None
        assert level.tokens == TOKENS
        clipped = scaled(server - trainer, trainer).abs().clamp(max=2 * level.rounding.high_bound)
        assert level.mean == pytest.approx(clipped.mean().item())


@pytest.mark.parametrize(
    ("moved", "part", "message"),
    [
        pytest.param(1.0, 1.0, "the mean over 400 tokens", id="all tokens"),
        pytest.param(4.0, 0.12, "the mean over|tokens are over", id="one replica of eight"),
    ],
)
def test_another_server_is_refused(moved: float, part: float, message: str) -> None:
    import re

    forwards = Forwards(1)
    level, trainer, server = StepLevel(measured(forwards)), forwards.of(), forwards.of()
    other = torch.arange(TOKENS) < part * TOKENS
    server = torch.where(other, forwards.of(moved), server)
    bound = torch.tensor(level.rounding.high_bound)
    problem = level.add(level_figures(trainer, server, everything(trainer), bound).tolist())
    assert problem is not None and re.search(message, problem)


def test_many_tokens_over_the_bound_are_refused_where_the_mean_is_not() -> None:
    level = StepLevel(Rounding(TOKENS, 0.06, 0.14))
    figures = [400.0, 30.0, 0.9, 400 * 0.1, 0.5, 25.0, 0.0]
    assert level.mean != level.mean  # nothing yet
    problem = level.add(figures)
    assert problem is not None and problem.startswith("25 of 400 tokens are over")
    assert StepLevel(Rounding(TOKENS, 0.06, 0.14)).add([*figures[:5], 24.0, 0.0]) is None


def test_tokens_that_do_not_count_do_not_count() -> None:
    trainer = torch.tensor([-0.5, -1.0, -2.0])
    server = torch.tensor([-0.5, float("nan"), -3.0])
    inf = torch.tensor(math.inf)
    first = torch.tensor([True, False, False])
    assert level_figures(trainer, server, first, inf).tolist()[:4] == [1.0, 0.0, 0.0, 0.0]
    assert (
        StepLevel(Rounding(9, 1.0, 1.0)).add(level_figures(trainer, server, first, inf).tolist())
        is None
    )
    none = level_figures(trainer, server, torch.zeros(3, dtype=torch.bool), inf).tolist()
    assert none[0] == 0.0 and math.isnan(none[4])
    assert StepLevel(Rounding(9, 1.0, 1.0)).add(none) is None
    every = level_figures(trainer, server, everything(trainer), inf).tolist()
    assert StepLevel(Rounding(9, 1.0, 1.0)).add(every) == "1 log-probs are not finite"


@pytest.mark.parametrize("moved", [0.5, 0.15])
def test_the_version_before_is_told_from_this_one(moved: float) -> None:
    for seed in range(20):
        forwards = Forwards(seed)
        for stale in (0.0, 1.0):
            found = VersionEvidence()
            found.add(evidence(forwards, moved, stale))
            assert (found.current, found.stale) == (not stale, bool(stale))
            coefficient, error = found.coefficient
            assert coefficient == pytest.approx(stale, abs=max(0.15, 4 * error))


def test_half_the_replicas_behind() -> None:
    forwards = Forwards(3)
    found = VersionEvidence()
    found.add(evidence(forwards, 0.5, stale=0.5))
    assert found.coefficient[0] == pytest.approx(0.5, abs=0.15)
    assert found.stale


def test_versions_within_the_rounding_take_several_steps() -> None:
    """Here they differ by a sixth of what the server rounds: 400 tokens say little."""
    for stale in (0.0, 1.0):
        found, decided_at = VersionEvidence(), []
        for step in range(40):
            found.add(evidence(Forwards(step), NOISE / 6, stale))
            assert not (found.current if stale else found.stale)
            if found.current or found.stale:
                decided_at.append(found.steps)
            if found.stale:
                break
        assert decided_at and 1 < decided_at[0] < 15


def test_equal_versions_are_never_decided() -> None:
    """A rate of zero: the two differ by rounding alone, and no number of steps says which."""
    found = VersionEvidence()
    for step in range(300):
        found.add(evidence(Forwards(step), 0.0, 0.0))
        assert not found.current and not found.stale
    assert found.steps == 300


def test_a_server_that_falls_behind_does_not_live_on_its_past() -> None:
    found = VersionEvidence()
    for step in range(30):
        found.add(evidence(Forwards(step), 0.3, 0.0))
        assert found.current and found.steps == 1
    found.add(evidence(Forwards(99), 0.3, 1.0))
    assert found.stale


def test_few_tokens_decide_nothing() -> None:
    found = VersionEvidence()
    found.add(evidence(Forwards(0), 2.0, 1.0, seen=15))
    assert found.coefficient == (0.5, math.inf) and not found.stale
    empty = VersionEvidence()
    empty.add([0.0, 0.0, 0.0, 0.0])
    assert empty.coefficient == (0.5, math.inf)


def test_nudging_moves_one_number_in_61_by_one_last_place() -> None:
    cartridge = random_cartridge(tiny_model(), tokens=32)
    served = cartridge.prefix(torch.bfloat16)
    moved = nudged(cartridge.prefix(), torch.bfloat16)
    for before, after in zip(served.keys + served.values, moved.keys + moved.values, strict=True):
        assert after.dtype == torch.bfloat16 and not after.requires_grad
        changed = before != after
        assert changed.sum() == math.ceil(before.numel() / 61)
        away = (after.float() - before.float()).abs()[changed] / before.float().abs()[changed]
        assert 2**-8 <= away.min() and away.max() <= 2**-6


def test_rounding_refuses_what_is_not_finite_and_is_never_nothing() -> None:
    trainer = torch.tensor([-0.5, -1.0])
    assert Rounding.of(2, rounding_figures(trainer, trainer).tolist(), torch.bfloat16).mean == 2**-7
    with pytest.raises(ValueError, match="not finite"):
        Rounding.of(2, rounding_figures(trainer, trainer * math.nan).tolist(), torch.bfloat16)
    with pytest.raises(ValueError, match="above 0"):
        Rounding(2, 0.1, 0.2).at(0.0)
    assert Rounding(2, 0.1, 0.2).at(2.0) == Rounding(2, 0.05, 0.1)


def tiny_world(seed: int = 0, rate: float = 0.02) -> World:
    """The tiny Llama in bfloat16, random prompts, a random document of 100 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(3, VOCAB - 3, (length,), generator=generator).tolist()

    return World(
        model=prepare_model(tiny_model().to(torch.bfloat16)),
        prompts=[draw(4 + number % 9) for number in range(640)],
        document=draw(100),
        tokens=32,
        response=8,
        rate=rate,
        seed=seed,
    )


def trained(steps: int, every: int) -> Experiment:
    experiment = Experiment(tiny_world(), steps, prompts=8)
    for step in range(steps):
        wrong = [CARTRIDGE, BASE] if step == 0 else [BACK, CARTRIDGE, BASE]
        experiment.train(wrong if step % every == 0 else list(experiment.undecided))
    return experiment


def check_outcomes(experiment: Experiment) -> None:
    outcomes = experiment.outcomes
    assert outcomes["healthy"].count == 0, outcomes["healthy"].refused
    for name in (CARTRIDGE, BASE):
        assert all(outcomes[name].refused), name
    refused = [message for message in outcomes[BACK].refused if message]
    assert all("by the version before" in message for message in refused)


def test_a_tiny_model_in_bfloat16() -> None:
    """The embedded server's engine: at the start, at the full rate, and while it falls."""
    experiment = trained(steps=13, every=5)
    assert len(experiment.outcomes[CARTRIDGE].refused) == 3
    assert experiment.outcomes[BACK].refused[0]  # at the full rate, in one step
    check_outcomes(experiment)


@pytest.mark.long
def test_no_false_alarm_in_1000_steps() -> None:
    experiment = trained(steps=1000, every=100)
    assert len(experiment.outcomes["healthy"].refused) == 1000
    check_outcomes(experiment)
    behind = experiment.outcomes[BACK]
    # Late the versions differ by a fraction of the rounding, and 64 tokens a step say little.
    assert behind.count == 9, [message is not None for message in behind.refused]
