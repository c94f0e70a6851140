"""What was answered: a few questions with each condition's words, and all of them with marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cartridge_distill.evaluation.names import FULL_DOCUMENT, TRAINED, UNTRAINED
from cartridge_distill.report import colours
from cartridge_distill.report.groups import Group
from cartridge_distill.report.reading import condition_order


@dataclass(frozen=True)
class Column:
    """A condition, or the cartridge of one of several groups; its first seed's answers."""

    name: str
    style: colours.Style
    condition: str
    place: int


@dataclass(frozen=True)
class Marked:
    """A question and, for each column, whether its likeliest option was the right one.

    Attributes:
        losses: nats per token of the right answer, for each column.
        right: whether every cartridge was right.
        known: whether the full document was; None where it was not asked.
    """

    question: str
    answer: str
    marks: list[bool]
    losses: list[float]
    right: bool
    known: bool | None


def samples(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """By question: what each condition answers, and each group's cartridge (its first seed's)."""
    found: dict[str, dict[str, Any]] = {}
    for place, group in enumerate(groups):
        evaluation = group.runs[0].evaluation
        for sample in evaluation.samples if evaluation else ():
            entry = found.setdefault(
                sample.question,
                {"question": sample.question, "right": sample.right_answer, "answers": {}},
            )
            for condition, text in sample.answers.items():
                if condition == UNTRAINED:  # worse than none to read, and in the table
                    continue
                column = _column(groups, place, condition)
                key = (condition_order(condition), column.place, column.name)
                entry["answers"].setdefault(key, (column.name, column.style, text))
    return [
        {**entry, "answers": [answer for _, answer in sorted(entry["answers"].items())]}
        for entry in found.values()
    ]


def _column(groups: Sequence[Group], place: int, condition: str) -> Column:
    trained = condition == TRAINED
    style = colours.of_run(place) if trained else colours.of_condition(condition)
    name = groups[place].name if trained and len(groups) > 1 else condition
    return Column(name, style, condition, place if trained else 0)


def all_questions(groups: Sequence[Group]) -> tuple[list[Column], list[Marked]]:
    """Every question of the first group, and what the other groups' cartridges make of it.

    Returns:
        Nothing where the evaluation kept no questions with their texts; a group that was asked
        other questions has no column.
    """
    first = groups[0].runs[0].questions
    if first is None or not first.asked:
        return [], []
    asked = {_column(groups, 0, name): table for name, table in first.tables.items()}
    for place, group in enumerate(groups[1:], 1):
        other = group.runs[0].questions
        if other is not None and other.asked == first.asked and TRAINED in other.tables:
            asked[_column(groups, place, TRAINED)] = other.tables[TRAINED]
    # In the order of the table above them: each group's cartridge beside the others'.
    columns = sorted(asked, key=lambda column: (condition_order(column.condition), column.place))
    tables = [asked[column] for column in columns]
    marks = [table["likelihood_correct"].astype(bool).tolist() for table in tables]
    losses = [table["log_loss"].astype(float).tolist() for table in tables]
    cartridges = [at for at, column in enumerate(columns) if column.condition == TRAINED]
    full = next((at for at, each in enumerate(columns) if each.condition == FULL_DOCUMENT), None)
    return columns, [
        Marked(
            question,
            answer,
            [column[row] for column in marks],
            [column[row] for column in losses],
            all(marks[at][row] for at in cartridges),
            None if full is None else marks[full][row],
        )
        for row, (question, answer) in enumerate(first.asked)
    ]
