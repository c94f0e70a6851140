"""The sentence at the top: its arithmetic, and that it says so when there is nothing to praise."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import quantiles, stdev
from typing import Any

import pandas as pd
import pytest

from cartridge_distill.report import verdict
from cartridge_distill.report.comparison import Comparison, compare
from cartridge_distill.report.groups import group_runs, token_axis
from cartridge_distill.report.reading import Interval, read_run
from tests.report import made


def interval(mean: float, half: float = 0.0) -> Interval:
    return Interval(mean=mean, low=mean - half, high=mean + half)


def test_the_share_of_exact_means_is_exact() -> None:
    share = verdict.share_closed(interval(3.92), interval(2.07), interval(1.27), 0.95)
    assert share is not None
    assert (share.value, share.low, share.high) == pytest.approx([1.85 / 2.65] * 3)


def test_only_the_trained_mean_uncertain() -> None:
    """Then the interval is the trained one's, on the scale of the gap."""
    share = verdict.share_closed(interval(4.0), interval(3.0, 0.4), interval(2.0), 0.95)
    assert share is not None
    assert (share.value, share.low, share.high) == pytest.approx((0.5, 0.3, 0.7))


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_is_what_repeated_draws_give(confidence: float) -> None:
    """Independent normal means, drawn often: the quantiles of the share itself."""
    draw = random.Random(0)
    ends = interval(4.0, 0.2), interval(2.6, 0.25), interval(1.5, 0.1)
    share = verdict.share_closed(*ends, confidence)
    assert share is not None
    z = verdict.NormalDist().inv_cdf(0.5 + confidence / 2)
    shares = []
    for _ in range(20_000):
        u, t, f = (draw.gauss(each.mean, (each.high - each.mean) / z) for each in ends)
        shares.append((u - t) / (u - f))
    cuts = quantiles(shares, n=200)
    tail = round(100 * (1 - confidence))
    assert share.low == pytest.approx(cuts[tail - 1], abs=0.015)
    assert share.high == pytest.approx(cuts[199 - tail], abs=0.015)


def test_what_all_conditions_share_makes_the_interval_no_wider_than_told() -> None:
    """Means of the same questions, some of them harder for all three."""
    draw = random.Random(1)
    shares, hard, own = [], 0.4, 0.15
    for _ in range(20_000):
        common = draw.gauss(0, hard)
        u, t, f = (mean + common + draw.gauss(0, own) for mean in (4.0, 2.6, 1.5))
        shares.append((u - t) / (u - f))
    z = verdict.NormalDist().inv_cdf(0.975)
    half = z * (hard**2 + own**2) ** 0.5
    told = verdict.share_closed(*(interval(m, half) for m in (4.0, 2.6, 1.5)), 0.95)
    assert told is not None
    cuts = quantiles(shares, n=40)
    assert told.low < cuts[0] and told.high > cuts[-1]


def test_no_share_of_a_gap_that_is_not_there() -> None:
    assert verdict.share_closed(interval(2, 0.4), interval(1.9), interval(1.8, 0.4), 0.95) is None
    assert verdict.share_closed(interval(1), interval(1.9), interval(1.8), 0.95) is None


def test_paired_questions_give_a_narrower_interval_of_the_same_share(tmp_path: Path) -> None:
    """Against the definition: the share's bootstrap, drawn one question at a time."""
    folder = made.write_run(tmp_path / "run")
    table = pd.read_parquet(made.write_questions(folder))
    questions = read_run(folder).questions
    assert questions is not None
    share = verdict.share_of_questions(questions, "log_loss", 0.95)
    assert share is not None
    wide = table.pivot(index="question_index", columns="condition", values="log_loss")
    rows = wide[["untrained cartridge", "trained cartridge", "full document"]].to_numpy().tolist()
    draw, shares = random.Random(3), []
    for _ in range(2000):
        u, t, f = map(sum, zip(*draw.choices(rows, k=len(rows)), strict=True))
        shares.append((u - t) / (u - f))
    cuts = quantiles(shares, n=40)
    assert (share.low, share.high) == pytest.approx((cuts[0], cuts[-1]), abs=0.01)
    u, t, f = map(sum, zip(*rows, strict=True))
    assert share.value == pytest.approx((u - t) / (u - f))
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    halves = [1.96 * stdev(column) / len(rows) ** 0.5 for column in zip(*rows, strict=True)]
    alone = verdict.share_closed(
        *(interval(m, h) for m, h in zip(means, halves, strict=True)), 0.95
    )
    assert alone is not None and alone.high - alone.low > 1.5 * (share.high - share.low)


def test_the_verdict_takes_the_questions_where_they_are(tmp_path: Path) -> None:
    folder = made.write_run(tmp_path / "run")
    without = verdict.of_one(group_runs([read_run(folder)])[0])
    made.write_questions(folder)
    paired = verdict.of_one(group_runs([read_run(folder)])[0])
    assert "taken as independent" in without.note and "paired" in paired.note
    assert paired.sentence != without.sentence


def of(tmp_path: Path, **changes: Any) -> verdict.Verdict:
    run = read_run(made.write_run(tmp_path / "run", evaluated=made.evaluation(**changes)))
    return verdict.of_one(group_runs([run])[0])


def test_a_good_cartridge(tmp_path: Path) -> None:
    said = of(tmp_path)
    assert said.good is True
    assert said.sentence == (
        "The cartridge closes 70 % [64, 76] of the way from the untrained cartridge to the full "
        "document in log-loss of the right answer (3.92 → 2.07; full document 1.27). "
        "It takes 128 KV tokens in place of 591 (4.6× fewer)."
    )


def test_retrieval_that_does_better_is_in_the_sentence(tmp_path: Path) -> None:
    conditions = made.evaluation()["conditions"]
    conditions[1] = made.condition("best chunk", 126, 0.5, 1.72, 0.8)
    said = of(tmp_path, conditions=conditions)
    assert said.sentence.endswith("; the best chunk alone, with 126, comes to 1.72.")


def test_a_cartridge_that_got_worse(tmp_path: Path) -> None:
    said = of(tmp_path, log_loss=5.0)
    assert said.good is False and "worse than the untrained one" in said.sentence
    assert "closes" not in said.sentence
    assert "by 41 % [24, 58] of the gap" in said.sentence


def test_an_interval_with_zero_in_it(tmp_path: Path) -> None:
    said = of(tmp_path, log_loss=3.8)
    assert said.good is None and "no certain effect" in said.sentence
    assert "contains zero" in said.sentence


def test_a_document_that_does_not_help(tmp_path: Path) -> None:
    conditions = made.evaluation()["conditions"]
    conditions[-1] = made.condition("full document", 591, 0.0, 3.9, 0.9)
    said = of(tmp_path, conditions=conditions)
    assert said.good is None and "no gap for training to close" in said.sentence


def test_kl_decides_where_there_is_no_log_loss(tmp_path: Path) -> None:
    conditions = made.evaluation()["conditions"]
    for row in conditions:
        row["metrics"].pop("log_loss")
    assert "in KL to the full document (0.91 → 0.64; full document 0.00)" in (
        of(tmp_path, conditions=conditions).sentence
    )


def test_without_an_evaluation_there_is_no_verdict(tmp_path: Path) -> None:
    run = read_run(made.write_run(tmp_path / "run", evaluated={}))
    said = verdict.of_one(group_runs([run])[0])
    assert said.good is None and said.sentence.startswith("No verdict")
    assert "KL to the full document went from 0.9" in said.sentence
    assert str(tmp_path / "run") in said.note


def test_without_the_ends_there_is_no_verdict(tmp_path: Path) -> None:
    conditions = made.evaluation()["conditions"]
    said = of(tmp_path / "one", conditions=conditions[3:])
    assert said.good is None and "lacks the untrained cartridge, between" in said.sentence
    said = of(tmp_path / "two", conditions=[conditions[3]])
    assert "lacks the untrained cartridge and the full document, between" in said.sentence
    for row in conditions:
        row["metrics"] = {"accuracy": row["metrics"]["accuracy"]}
    said = of(tmp_path / "none", conditions=conditions)
    assert said.good is None and "lacks" not in said.sentence
    assert "log-loss of the right answer" in said.note


def test_held_out_prompts_decide_where_there_are_no_questions(tmp_path: Path) -> None:
    """As an own document without questions is evaluated: all conditions, on prompts alone."""
    conditions = made.evaluation()["conditions"]
    for row in conditions:
        row["metrics"] = {"kl": None, "log_loss": None, "prompt_kl": row["metrics"]["kl"]}
    folder = made.write_run(tmp_path / "run", evaluated=made.evaluation(conditions=conditions))
    without = verdict.of_one(group_runs([read_run(folder)])[0])
    assert "in KL to the full document on held-out prompts (0.91 → 0.64;" in without.sentence
    assert "each of the prompts, is not there" in without.note
    questions = made.write_questions(folder)
    table = pd.read_parquet(questions).rename(columns={"question_index": "prompt_index"})
    told = ["log_loss", "question", "right_answer", "likelihood_correct"]
    table.drop(columns=told).to_parquet(folder / "evaluation_prompts.parquet")
    questions.unlink()
    paired = verdict.of_one(group_runs([read_run(folder)])[0])
    assert paired.good and "by bootstrap over the prompts, paired" in paired.note
    share = 100 * (0.905 - 0.637) / 0.905
    assert f"closes {share:.0f} %" in without.sentence


@pytest.mark.parametrize(
    ("losses", "good", "said"),
    [
        ((2.0, 2.1, 2.2), True, "closes 69 % [65 to 72 over 3 seeds]"),
        ((3.8, 3.9, 4.0), None, "no certain effect"),
        ((4.2, 4.3, 4.4), False, "makes the cartridge worse"),
    ],
)
def test_seeds_of_one_recipe(
    tmp_path: Path, losses: tuple[float, ...], good: bool | None, said: str
) -> None:
    runs = [
        read_run(
            made.write_run(
                tmp_path / f"{seed}", seed=seed, evaluated=made.evaluation(log_loss=log_loss)
            )
        )
        for seed, log_loss in enumerate(losses)
    ]
    (group,) = group_runs(runs)
    found = verdict.of_one(group)
    assert found.good is good and said in found.sentence


def compared(folders: list[Path]) -> tuple[Comparison | None, verdict.Verdict]:
    runs = [read_run(folder) for folder in folders]
    axis = token_axis(runs)
    comparison = compare(group_runs(runs), axis)
    return comparison, verdict.of_several(comparison, axis)


def test_recipes_are_compared_where_all_have_a_value(tmp_path: Path) -> None:
    comparison, said = compared(made.write_recipes(tmp_path))
    assert comparison is not None and comparison.tokens is not None
    names = [standing.group.name for standing in comparison.standings]
    assert names == ["mixed", "off-policy", "on-policy"]
    assert said.good is True and "outside the spread of the seeds" in said.sentence


def curve(*points: tuple[int, float], tokens: int = 100) -> list[dict[str, Any]]:
    return [
        {"step": step, "data": {"val/kl": kl, "tokens/total_trained": step * tokens}}
        for step, kl in points
    ]


def test_equal_tokens_are_not_equal_steps(tmp_path: Path) -> None:
    """One run takes twice the tokens a step: its later steps do not count."""
    slow = made.write_run(tmp_path / "a", name="a", lines=curve((0, 1.0), (4, 0.6)))
    fast = made.write_run(
        tmp_path / "b", name="b", lines=curve((0, 1.0), (2, 0.7), (4, 0.1), tokens=200)
    )
    comparison, said = compared([fast, slow])
    assert comparison is not None and comparison.tokens == 400
    assert [(s.group.name, s.mean) for s in comparison.standings] == [("a", 0.6), ("b", 0.7)]
    assert said.good is None and "may be chance" in said.sentence


def test_overlapping_seeds_have_no_winner(tmp_path: Path) -> None:
    ends = {("a", 0): 0.50, ("a", 1): 0.58, ("b", 0): 0.56, ("b", 1): 0.66}
    folders = [
        made.write_run(
            tmp_path / f"{name}{seed}", name=name, seed=seed, lines=curve((0, 1.0), (4, kl))
        )
        for (name, seed), kl in ends.items()
    ]
    comparison, said = compared(folders)
    assert comparison is not None
    assert comparison.standings[0].mean == pytest.approx(0.54)
    assert said.good is None and "no winner" in said.sentence


def test_without_curves_the_ends_are_compared_and_it_is_said(tmp_path: Path) -> None:
    lines = [{"step": 1, "data": {"actor/loss": 1.0, "perf/tokens": 10}}]
    folders = [
        made.write_run(
            tmp_path / name, name=name, lines=lines, evaluated=made.evaluation(log_loss=loss)
        )
        for name, loss in (("a", 2.0), ("b", 3.0))
    ]
    comparison, said = compared(folders)
    assert comparison is not None and comparison.tokens is None
    assert "their tokens may differ" in said.sentence and "“a”" in said.sentence


def test_nothing_in_common_is_no_verdict(tmp_path: Path) -> None:
    lines = [{"step": 1, "data": {"actor/loss": 1.0}}]
    folders = [
        made.write_run(tmp_path / name, name=name, lines=lines, evaluated={}) for name in "ab"
    ]
    comparison, said = compared(folders)
    assert comparison is None and said.sentence.startswith("No verdict")
