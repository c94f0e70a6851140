"""What the rows of ``--measures`` come to: scores of a condition, and its curve over position.

Every score is a ratio of sums over questions, or over unrelated prompts, so that its interval is
the bootstrap's over them: the texts of one question are drawn together. Positions count a text's
tokens from 1; errors that compound show where they are late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cartridge_distill.evaluation.bootstrap import Ratio, estimate
from cartridge_distill.evaluation.measure_rows import FREE, GREEDY, OffContext, OwnText

BANDS = ((1, 4), (5, 16), (17, 64), (65, 256))
"""First and last position of each band."""

_CURVE = (1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193)
"""Where each point of the curve begins; four to eight bins an octave would be noise."""


@dataclass(frozen=True)
class MeasureRows:
    """The rows of one condition, or of all."""

    texts: list[OwnText] = field(default_factory=list)
    off_context: list[OffContext] = field(default_factory=list)

    def of(self, condition: str) -> MeasureRows:
        """A condition's rows, in the order of the questions and of the prompts."""
        return MeasureRows(
            sorted((r for r in self.texts if r.condition == condition), key=lambda r: r.index),
            sorted(
                (r for r in self.off_context if r.condition == condition),
                key=lambda r: r.prompt_index,
            ),
        )


Part = Callable[[OwnText], tuple[float, float]]
"""A text -> what it adds above and below the line of a ratio."""

Score = Callable[[MeasureRows], Ratio | None]


def _over_questions(rows: Sequence[OwnText], part: Part) -> Ratio | None:
    """One term a question; None where no text has anything to count."""
    above: dict[int, float] = {}
    below: dict[int, float] = {}
    for row in rows:
        value, weight = part(row)
        above[row.question_index] = above.get(row.question_index, 0.0) + value
        below[row.question_index] = below.get(row.question_index, 0.0) + weight
    if not any(below.values()):
        return None
    return Ratio([above[index] for index in sorted(above)], [below[i] for i in sorted(below)])


def _within(nats: Callable[[OwnText], list[float]], first: int, last: int | None) -> Part:
    def part(row: OwnText) -> tuple[float, float]:
        found = nats(row)[first - 1 : last]
        return sum(found), len(found)

    return part


def _forward(row: OwnText) -> list[float]:
    return row.kl


def _reverse(row: OwnText) -> list[float]:
    return row.reverse_kl


_NATS = {"student_kl": _forward, "student_reverse_kl": _reverse}

_OF_TEXTS: dict[str, Part] = {
    "topk_overlap": lambda row: (row.overlap, row.tokens),
    "topk_overlap_mass": lambda row: (row.overlap_mass, row.tokens),
    "student_entropy": lambda row: (row.entropy, row.tokens),
    "answer_tokens": lambda row: (row.tokens, 1),
    "repetition": lambda row: (row.repeated, row.ngrams),
    "ended": lambda row: (row.ended, 1),
}


def _texts(part: Part) -> Score:
    return lambda rows: _over_questions(rows.texts, part)


def _match(rows: MeasureRows) -> Ratio | None:
    free = [row for row in rows.texts if (row.start, row.sampling) == (FREE, GREEDY)]
    return _over_questions(free, lambda row: (row.matched, 1))


def _off_context(rows: MeasureRows) -> Ratio | None:
    if not rows.off_context:
        return None
    return Ratio(
        [r.kl_sum for r in rows.off_context], [float(r.kl_tokens) for r in rows.off_context]
    )


_BY_BAND: dict[str, Score] = {
    f"{name}_{first}_{last}": _texts(_within(nats, first, last))
    for name, nats in _NATS.items()
    for first, last in BANDS
}
BAND_SCORES = frozenset(_BY_BAND)
"""Names of the scores at some positions alone."""

SCORES: dict[str, Score] = {
    **{name: _texts(_within(nats, 1, None)) for name, nats in _NATS.items()},
    **_BY_BAND,
    "generated_match": _match,
    **{name: _texts(part) for name, part in _OF_TEXTS.items()},
    "off_context_kl": _off_context,
}
"""A score's name in the summary -> the ratio it is; None where it was not asked for.

docs/evaluation.md says what each of them is. ``generated_match`` is of free, greedy texts; the
others of own text are of all of a question's texts together.
"""


def measured(rows: MeasureRows) -> list[str]:
    """The scores that the groups with rows have."""
    names = [name for name in SCORES if name != "off_context_kl"] if rows.texts else []
    return [*names, *(["off_context_kl"] if rows.off_context else [])]


def curve(rows: MeasureRows, seed: int) -> list[dict[str, Any]]:
    """``student_kl`` and ``student_reverse_kl`` along a condition's texts, with intervals.

    Returns:
        A point a bin: ``first`` and ``last`` position, ``tokens`` in it, and by score its
        ``{mean, low, high, n}``. Bins that no text reached are left out.
    """
    ends = [*(start - 1 for start in _CURVE[1:]), BANDS[-1][1]]
    points: list[dict[str, Any]] = []
    for first, last in zip(_CURVE, ends, strict=True):
        found = {
            name: ratio
            for name, nats in _NATS.items()
            if (ratio := _over_questions(rows.texts, _within(nats, first, last))) is not None
        }
        if found:
            tokens = sum(next(iter(found.values())).weights)
            scores = {name: asdict(estimate(ratio, seed)) for name, ratio in found.items()}
            points.append({"first": first, "last": last, "tokens": int(tokens), **scores})
    return points


def by_text(rows: MeasureRows, seed: int) -> list[dict[str, Any]]:
    """The scores of each kind of text apart: how it began and how its tokens were chosen."""
    found = []
    for start, sampling in dict.fromkeys((row.start, row.sampling) for row in rows.texts):
        kind = MeasureRows([r for r in rows.texts if (r.start, r.sampling) == (start, sampling)])
        match = _over_questions(kind.texts, lambda row: (row.matched, 1))
        ratios = {name: SCORES[name](kind) for name in measured(kind)} | {"generated_match": match}
        scores = {n: None if r is None else asdict(estimate(r, seed)) for n, r in ratios.items()}
        found.append({"start": start, "sampling": sampling, "metrics": scores})
    return found
