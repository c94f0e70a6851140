"""How much a condition changes answers that its document has nothing to say about.

``off_context_kl``: the bare model, with what it always begins with, writes its likeliest answer to
a prompt that has nothing to do with any document; over these tokens the score is
KL(bare model || condition), over the whole vocabulary, in nats per token: all prompts' nats over
all prompts' tokens. It is zero for a condition that leaves such prompts alone. A cartridge tends to
change them more than the whole document does; general rows in the training teach it not to
(``cartridge_distill.data.general``).

The prompts are the package's own, none of which ``prepare`` takes for training. Conditions that
read a document read one of the evaluation's, each prompt the next of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cartridge_distill.data.general_rows import off_context_prompts
from cartridge_distill.evaluation.conditions import Condition, no_document
from cartridge_distill.evaluation.data import Numbered, in_chunks
from cartridge_distill.evaluation.harness import Progress, by_view
from cartridge_distill.evaluation.journal import Journal, off_context_key
from cartridge_distill.evaluation.measure_rows import OffContext
from cartridge_distill.evaluation.names import OFF_CONTEXT_TOKENS
from cartridge_distill.evaluation.prompts import end_ids, started_prompt
from cartridge_distill.evaluation.scoring import TeacherAnswers, kl_sums


@dataclass(frozen=True)
class _Unrelated:
    """A prompt, and the document that a condition has read before it."""

    document_id: str
    text: str
    ids: list[int]


class OffContextPrompts:
    """Asks every condition the unrelated prompts.

    Args:
        model, tokenizer, conditions: as for ``harness.Evaluation``.
        document_ids: of the evaluation.
        seed: stands in the rows.
        chunk: prompts at once.
        texts: the prompts; the package's by default.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        conditions: Sequence[Condition],
        document_ids: Sequence[str],
        seed: int = 0,
        chunk: int = 8,
        texts: Sequence[str] | None = None,
    ) -> None:
        self._model, self._conditions = model, list(conditions)
        self._seed, self._chunk = seed, chunk
        self._ends = end_ids(model, tokenizer)
        self._bare = no_document(model, tokenizer).view("", "").prefix
        self._prompts = [
            _Unrelated(
                document_ids[number % len(document_ids)], text, started_prompt(tokenizer, text, "")
            )
            for number, text in enumerate(off_context_prompts() if texts is None else texts)
        ]

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return len(self._prompts)

    def run(self, journal: Journal, progress: Progress | None = None) -> None:
        """Puts into the journal what is not in it.

        Raises:
            DocumentError: a document is missing or too long for the model.
            CartridgeDistillError: the logits behind a prefix are not finite.
        """
        done, total = 0, len(self._conditions) * len(self._prompts)
        for chunk in in_chunks(self._prompts, self._chunk):
            bare: TeacherAnswers | None = None
            for condition in self._conditions:
                places = [
                    place
                    for place, each in enumerate(chunk)
                    if off_context_key(condition.name, each.index) not in journal
                ]
                if places:
                    if bare is None:
                        asked = [each.item.ids for each in chunk]
                        bare = TeacherAnswers.of(
                            self._model, self._bare, asked, OFF_CONTEXT_TOKENS, self._ends
                        )
                    journal.add(self._rows(condition, chunk, places, bare))
                done += len(chunk)
                if progress is not None:
                    progress(done, total)

    def _rows(
        self,
        condition: Condition,
        chunk: list[Numbered[_Unrelated]],
        places: list[int],
        bare: TeacherAnswers,
    ) -> list[OffContext]:
        views = [condition.view(chunk[i].item.document_id, chunk[i].item.text) for i in places]
        sums: dict[int, float] = {}
        for view, group in by_view(views, places):
            found = kl_sums(self._model, view.prefix, bare.take(group))
            sums.update(zip(group, found, strict=True))
        return [
            OffContext(
                condition=condition.name,
                document_id=chunk[i].item.document_id,
                prompt_index=chunk[i].index,
                prompt=chunk[i].item.text,
                seed=self._seed,
                kl_sum=sums[i],
                kl_tokens=len(bare.answers[i]),
                kv_tokens=view.kv_tokens,
            )
            for i, view in zip(places, views, strict=True)
        ]
