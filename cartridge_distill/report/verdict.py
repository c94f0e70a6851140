"""The sentences at the top of the report, computed and plain about what they do not show.

One recipe: which share of the way from the untrained cartridge to the full document the trained one
goes. Several: which is best after equal tokens, and whether the seeds' spread explains it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean

import numpy as np

from cartridge_distill.evaluation.names import BEST_CHUNK, FULL_DOCUMENT, TRAINED, UNTRAINED
from cartridge_distill.report.comparison import DECIDING, Comparison, Standing
from cartridge_distill.report.groups import Group, TokenAxis
from cartridge_distill.report.questions import Questions
from cartridge_distill.report.reading import Evaluation, Interval, Run

_ENDS = (UNTRAINED, TRAINED, FULL_DOCUMENT)


@dataclass(frozen=True)
class Verdict:
    """``sentence``, one or two of them, says it; ``note`` how it was computed.

    ``good`` colours it: None is open.
    """

    sentence: str
    note: str
    good: bool | None


@dataclass(frozen=True)
class Share:
    """Part of the way from the untrained cartridge (0) to the full document (1)."""

    value: float
    low: float
    high: float


def share_closed(
    untrained: Interval, trained: Interval, full: Interval, confidence: float
) -> Share | None:
    """``(untrained - trained) / (untrained - full)`` of a metric that is better when lower.

    The interval is the delta method's, with the three means taken as independent. They are of the
    same questions: what makes a question hard for all three cancels in the share, so that the
    interval is rather too wide than too narrow.

    Returns:
        None where the full document is not better than the untrained cartridge outside its own
        interval: a share of nothing.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    errors = [(each.high - each.low) / (2 * z) for each in (untrained, trained, full)]
    way = untrained.mean - full.mean
    if way <= z * math.hypot(errors[0], errors[2]):
        return None
    share = (untrained.mean - trained.mean) / way
    weights = (1 - share, 1.0, share)
    half = z * math.hypot(*(w * e for w, e in zip(weights, errors, strict=True))) / way
    return Share(share, share - half, share + half)


def share_of_questions(questions: Questions, metric: str, confidence: float) -> Share | None:
    """The same with the interval of a bootstrap over the questions, paired.

    Returns:
        None where the gap between untrained cartridge and full document is not above zero in the
        whole of its own interval.

    Raises:
        KeyError: a condition is not among the questions'.
    """
    tails = [50 * (1 - confidence), 50 * (1 + confidence)]
    draws = questions.draws()
    untrained, trained, full = (questions.resampled(name, metric, draws) for name in _ENDS)
    if np.percentile(untrained - full, tails[0]) <= 0:
        return None
    low, high = np.percentile((untrained - trained) / (untrained - full), tails)
    once = np.ones((1, draws.shape[1]))
    u, t, f = (float(questions.resampled(name, metric, once)[0]) for name in _ENDS)
    return Share((u - t) / (u - f), float(low), float(high))


def of_one(group: Group) -> Verdict:
    """Of a single run, or of the seeds of one recipe."""
    evaluations = [run.evaluation for run in group.runs]
    found = [each for each in evaluations if each is not None and each.get(TRAINED) is not None]
    if len(found) < len(group.runs):
        return _without_evaluation(group)
    for metric, title in DECIDING.items():
        rows = [[_interval(each, name, metric) for name in _ENDS] for each in found]
        if all(all(row) for row in rows):
            ends = [(u, t, f) for u, t, f in rows if u and t and f]
            if len(found) == 1:
                return _of_run(group.runs[0], found[0], ends[0], metric, title)
            return _of_seeds(found, ends, title)
    return _without_ends(found)


def _without_ends(evaluations: Sequence[Evaluation]) -> Verdict:
    lacking = [
        f"the {name}" for name in _ENDS if any(each.get(name) is None for each in evaluations)
    ]
    if lacking:
        return Verdict(
            f"No verdict: the evaluation lacks {' and '.join(lacking)}, between which it would be "
            "given.",
            "All conditions stand in the table that cartridge-distill eval writes by default.",
            None,
        )
    return Verdict(
        "No verdict: no score was measured for the untrained cartridge, the trained one and the "
        "full document alike.",
        f"Looked for: {', '.join(DECIDING.values())}.",
        None,
    )


def _interval(evaluation: Evaluation, condition: str, metric: str) -> Interval | None:
    row = evaluation.get(condition)
    return row.get(metric) if row is not None else None


def _without_evaluation(group: Group) -> Verdict:
    missing = [str(run.folder) for run in group.runs if run.evaluation is None]
    change = _validation_change(group.runs[0])
    return Verdict(
        "No verdict: the trained cartridge of this run was not evaluated." + change,
        f"evaluation.json is not in {', '.join(missing)}."
        if missing
        else "evaluation.json has no row of the trained cartridge.",
        None,
    )


def _validation_change(run: Run) -> str:
    points = run.metrics.series("val/kl")
    if len(points) < 2:
        return ""
    (first, before), (last, after) = points[0], points[-1]
    return (
        f" In training, KL to the full document went from {before:.2f} (step {first}) to "
        f"{after:.2f} (step {last})."
    )


def _of_run(
    run: Run,
    evaluation: Evaluation,
    ends: tuple[Interval, Interval, Interval],
    metric: str,
    title: str,
) -> Verdict:
    untrained, trained, full = ends
    room = _room(evaluation)
    figures = f"({untrained.mean:.2f} → {trained.mean:.2f}; full document {full.mean:.2f})"
    chunk = _better_chunk(evaluation, metric, trained)
    asked = "prompts" if metric == "prompt_kl" else "questions"
    paired = run.prompts if metric == "prompt_kl" else run.questions
    if paired is not None and set(_ENDS) <= set(paired.tables):
        share = share_of_questions(paired, metric, evaluation.confidence)
        how = f"by bootstrap over the {asked}, paired"
    else:
        share = share_closed(untrained, trained, full, evaluation.confidence)
        how = (
            "from those of the three means, taken as independent, which makes it rather too wide "
            f"than too narrow (their table, one row for each of the {asked}, is not there)"
        )
    level = f"{evaluation.confidence:.0%}".replace("%", " %")
    if share is None:
        return Verdict(
            f"The full document is not measurably better than the untrained cartridge in {title} "
            f"{figures}: there is no gap for training to close. {room}.",
            f"The {level} interval of their difference contains zero: ask more {asked}, or harder "
            "ones.",
            None,
        )
    between = f"[{_percent(share.low)}, {_percent(share.high)}]"
    note = (
        "The share is (untrained − trained) / (untrained − full document); in brackets its "
        f"{level} interval, {how}."
    )
    if share.high < 0:
        between = f"[{_percent(-share.high)}, {_percent(-share.low)}]"
        return Verdict(
            f"The trained cartridge is worse than the untrained one in {title} {figures}, by "
            f"{_percent(-share.value)} % {between} of the gap that it should have closed. "
            f"{room}{chunk}.",
            note,
            False,
        )
    if share.low <= 0:
        return Verdict(
            f"Training shows no certain effect: {_percent(share.value)} % of the way to the full "
            f"document in {title} {figures}, and the interval {between} contains zero. "
            f"{room}{chunk}.",
            note,
            None,
        )
    return Verdict(
        f"The cartridge closes {_percent(share.value)} % {between} of the way from the untrained "
        f"cartridge to the full document in {title} {figures}. {room}{chunk}.",
        note,
        True,
    )


def _better_chunk(evaluation: Evaluation, metric: str, trained: Interval) -> str:
    """What a reader must not have to find in the table: plain retrieval has the lower mean."""
    row = evaluation.get(BEST_CHUNK)
    found = row.get(metric) if row is not None else None
    if row is None or found is None or found.mean >= trained.mean:
        return ""
    return f"; the best chunk alone, with {row.kv_tokens:,}, comes to {found.mean:.2f}"


def _of_seeds(
    evaluations: Sequence[Evaluation],
    ends: Sequence[tuple[Interval, Interval, Interval]],
    title: str,
) -> Verdict:
    untrained, trained, full = (mean(row[place].mean for row in ends) for place in range(3))
    figures = f"({untrained:.2f} → {trained:.2f}; full document {full:.2f})"
    room, seeds = _room(evaluations[0]), f"{len(ends)} seeds"
    if untrained <= full:
        return Verdict(
            f"The full document is not better than the untrained cartridge in {title} {figures}: "
            f"there is no gap for training to close. {room}.",
            f"Means over {seeds}.",
            None,
        )
    shares = [(u.mean - t.mean) / (u.mean - f.mean) for u, t, f in ends]
    low, high = min(shares), max(shares)
    between = f"[{_percent(low)} to {_percent(high)} over {seeds}]"
    note = "The range is the seeds'; the intervals over the questions stand in the table."
    share = _percent(mean(shares))
    if high < 0:
        said = (
            f"Training makes the cartridge worse in {title} {figures}, with every seed {between}."
        )
        return Verdict(f"{said} {room}.", note, False)
    if low <= 0:
        said = f"Training has no certain effect on {title} {figures}: {share} % {between}."
        return Verdict(f"{said} {room}.", note, None)
    return Verdict(
        f"The cartridge closes {share} % {between} of the way from the untrained cartridge to the "
        f"full document in {title} {figures}. {room}.",
        note,
        True,
    )


def _room(evaluation: Evaluation) -> str:
    trained, full = evaluation.get(TRAINED), evaluation.get(FULL_DOCUMENT)
    assert trained is not None and full is not None  # the caller has their metrics
    few, many = trained.kv_tokens, full.kv_tokens
    fewer = f" ({many / few:.1f}× fewer)" if few and many > few else ""
    return f"It takes {few:,} KV tokens in place of {many:,}{fewer}"


def _percent(share: float) -> str:
    """In whole per cent, with a minus sign as typographers set it, and none before a zero."""
    return f"{round(100 * share)}".replace("-", "\N{MINUS SIGN}")


def of_several(comparison: Comparison | None, axis: TokenAxis | None) -> Verdict:
    """The best group against the second."""
    if comparison is None:
        return Verdict(
            "No verdict: these runs have neither a validation curve nor an evaluation in common.",
            "A verdict needs val/kl or val/log_loss in each metrics.jsonl, or evaluation.json.",
            None,
        )
    best, second = comparison.standings[:2]
    if comparison.tokens is None:
        where = "At the end of each run (their tokens may differ)"
    else:
        what = axis.title.partition(" (")[0] if axis else "tokens"
        where = f"After {comparison.tokens:,.0f} {what}"
    less = f"{second.mean - best.mean:.3f}"
    said = (
        f"{where}, “{best.group.name}” has the lowest {comparison.title}, {_spread(best)}, before "
        f"“{second.group.name}” with {_spread(second)}"
    )
    note = (
        "Compared on the lines between validations, at the largest count that every run reached. "
        if comparison.tokens is not None
        else ""
    )
    note += "A difference is outside the seeds' spread when the two ranges do not overlap."
    if len(best.values) < 2 or len(second.values) < 2:
        return Verdict(
            f"{said}; without several seeds of both, the difference of {less} may be chance.",
            note,
            None,
        )
    if max(best.values) < min(second.values):
        return Verdict(
            f"{said}: the difference of {less} is outside the spread of the seeds.", note, True
        )
    return Verdict(
        f"{said}: no winner, the difference of {less} is inside the spread of the seeds.",
        note,
        None,
    )


def _spread(standing: Standing) -> str:
    values = standing.values
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{standing.mean:.3f} [{min(values):.3f} to {max(values):.3f} over {len(values)} seeds]"
