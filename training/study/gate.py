"""The gate of a study: can the model answer these questions at all, with the document before it?

The full document must beat no document by 20 points of ``generated_match``: the part of free,
greedy answers that contain the right one. Where it does not, arms differ by noise, and a study
refuses to compare them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cartridge_distill.data.records import Question
from cartridge_distill.distill.teacher import Teacher
from cartridge_distill.evaluation.conditions import FullDocument, no_document
from cartridge_distill.evaluation.data import EvaluationData
from cartridge_distill.evaluation.free_answers import matches_any
from cartridge_distill.evaluation.names import FULL_DOCUMENT, NO_DOCUMENT
from cartridge_distill.evaluation.prompts import end_ids, started_prompt
from cartridge_distill.evaluation.scoring import greedy_answers
from cartridge_distill.util.errors import CartridgeDistillError

_AT_ONCE = 16


class GateFailed(CartridgeDistillError):
    """A document's questions cannot tell arms apart with this model."""


@dataclass(frozen=True)
class Gate:
    """What a model can do with a document's questions.

    Attributes:
        document: name.
        tokens: of the document, as the model reads it.
        questions: how many.
        full, none: ``generated_match`` with the full document, and with no document.
        kinds: kind of question -> (full, none, how many).
        answers: a row a question: what was asked, the wordings, both texts.
    """

    document: str
    tokens: int
    questions: int
    full: float
    none: float
    kinds: dict[str, tuple[float, float, int]]
    answers: list[dict[str, Any]]

    @property
    def points(self) -> float:
        """By how much the full document is ahead, in points of 100."""
        return 100 * (self.full - self.none)

    def check(self, least: float) -> None:
        """Refuses a document whose questions cannot tell.

        Args:
            least: points.

        Raises:
            GateFailed: the full document is not that far ahead.
        """
        # Of counts, so that 20 points of 25 questions are 20 whatever floats say.
        if round(self.points, 6) < least:
            raise GateFailed(
                f"{self.document}: with the full document {self.full:.0%} of {self.questions} free "
                f"answers are right, with no document {self.none:.0%}: {self.points:.0f} points, "
                f"and a comparison needs {least:.0f}. Fix: take the document out of the grid, ask "
                "what the model can answer, or take another model"
            )

    def line(self, least: float) -> str:
        """For a person."""
        word = "passes" if round(self.points, 6) >= least else "FAILS"
        kinds = "".join(f"; {kind}: {f:.2f} / {n:.2f}" for kind, (f, n, _) in self.kinds.items())
        return (
            f"{self.document}: {self.tokens} tokens, {self.questions} questions, generated_match "
            f"{self.full:.2f} with the document, {self.none:.2f} without{kinds}: {word}"
        )


def measure(
    model: Any,
    tokenizer: Any,
    name: str,
    data: EvaluationData,
    teacher: Teacher,
    tokens: int,
) -> Gate:
    """Asks the model all questions, with the document and without.

    Args:
        name: of the document.
        data: its folder's.
        teacher: has the documents.
        tokens: of an answer at most.
    """
    document = FullDocument(teacher)
    conditions = (document, no_document(model, tokenizer))
    texts = {
        condition.name: _texts(model, tokenizer, condition, data.questions, tokens)
        for condition in conditions
    }
    rows = [
        {
            "question": question.question,
            "wordings": list(question.wordings),
            "kind": question.kind,
            "full": full,
            "none": none,
            "full_right": matches_any(full, question.wordings),
            "none_right": matches_any(none, question.wordings),
        }
        for question, full, none in zip(
            data.questions, texts[FULL_DOCUMENT], texts[NO_DOCUMENT], strict=True
        )
    ]
    read = sum(len(teacher.document_ids(each)) for each in data.documents.ids)
    kinds = {}
    for kind in dict.fromkeys(question.kind for question in data.questions if question.kind):
        of_kind = [row for row in rows if row["kind"] == kind]
        kinds[kind] = (*_parts(of_kind), len(of_kind))
    return Gate(name, read, len(rows), *_parts(rows), kinds, rows)


def _parts(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    count = len(rows)
    return sum(r["full_right"] for r in rows) / count, sum(r["none_right"] for r in rows) / count


def _texts(
    model: Any, tokenizer: Any, condition: Any, questions: Sequence[Question], tokens: int
) -> list[str]:
    ends = end_ids(model, tokenizer)
    found: list[str] = []
    for start in range(0, len(questions), _AT_ONCE):
        part = questions[start : start + _AT_ONCE]
        # As own text begins freely: the answer has begun, with nothing.
        prompts = [started_prompt(tokenizer, question.question, "") for question in part]
        prefixes = [condition.view(q.document_id, q.question).prefix for q in part]
        for ids in greedy_answers(model, prefixes, prompts, tokens, ends):
            found.append(str(tokenizer.decode(ids, skip_special_tokens=True)))
    return found


def kept(path: Path, identity: dict[str, Any]) -> Gate | None:
    """A gate that was measured before, of the same model, document and questions."""
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.pop("identity") != json.loads(json.dumps(identity)):
        return None
    kinds = {kind: (f, n, count) for kind, (f, n, count) in content.pop("kinds").items()}
    return Gate(**content, kinds=kinds)


def keep(gate: Gate, path: Path, identity: dict[str, Any]) -> None:
    """Writes a gate, with its answers for a person to read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"identity": identity, **asdict(gate)}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
