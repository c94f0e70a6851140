"""All measures of one document's cartridges, with what is the same for all of them computed once.

Every run of a document is compared with the same four conditions (no document, best chunk, the
untrained cartridge, the full document). They are measured once, and their rows stand in the
evaluation of each run beside the trained cartridge's, so that a run's ``evaluation.json`` is whole
and ``cartridge-distill report`` reads it. Evaluations go on where they were stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.data.records import Question
from cartridge_distill.distill.integrity import weights_checksum
from cartridge_distill.distill.teacher import Teacher
from cartridge_distill.evaluation import answers
from cartridge_distill.evaluation.conditions import (
    BestChunk,
    Condition,
    Fixed,
    FullDocument,
    no_document,
)
from cartridge_distill.evaluation.data import EvaluationData
from cartridge_distill.evaluation.harness import Evaluation
from cartridge_distill.evaluation.identity import digest, versions
from cartridge_distill.evaluation.journal import Journal
from cartridge_distill.evaluation.names import OFF_CONTEXT, OWN_TEXT, TRAINED, UNTRAINED
from cartridge_distill.evaluation.off_context import OffContextPrompts
from cartridge_distill.evaluation.own_text import OwnTexts
from cartridge_distill.evaluation.results import Results, summarise, write_summary
from cartridge_distill.model.prompts import begin_of_text, render_document
from cartridge_distill.util.processes import say
from training.study.grid import Grid
from verl_patches.actor.initial_cartridge import initial_cartridge

EVALUATION_SEED = 0
"""Of the texts that conditions write and of the bootstrap; a run's own seed is of its training."""


class DocumentEvaluation:
    """Measures cartridges of one document.

    Args:
        model, tokenizer, name: the frozen base; ``name`` is its folder or hub id.
        grid: of the study.
        data: the document's data folder; its questions are asked.
        baseline: folder of the conditions that are the same for all runs.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, grid: Grid, data: Path, baseline: Path
    ) -> None:
        self._model, self._tokenizer, self._name, self._grid = model, tokenizer, name, grid
        self.data = EvaluationData.from_folder(data, tokenizer, limit=grid.limit_questions)
        self.teacher = Teacher(
            model,
            self.data.documents,
            partial(render_document, tokenizer),
            max_cached=1,
            begin=begin_of_text(tokenizer),
        )
        self._baseline_folder = baseline
        self._document = FullDocument(self.teacher)
        self._weights = digest(weights_checksum(model))
        self._baseline: Results | None = None

    @property
    def questions(self) -> list[Question]:
        """That are asked."""
        return self.data.questions

    def baseline(self) -> Results:
        """The rows of the conditions that no training changes."""
        if self._baseline is None:
            settings = self._grid.run_settings(next(iter(self._grid.arms)), self._grid.seeds[0])
            first = initial_cartridge(settings.cartridge, self._model, self.teacher, self._name)
            with torch.no_grad():
                untrained = Fixed(UNTRAINED, first.prefix().to(self.teacher.device))
            conditions: list[Condition] = [
                no_document(self._model, self._tokenizer),
                BestChunk(self.teacher, settings.cartridge.num_tokens),
                untrained,
                self._document,
            ]
            with Journal(self._baseline_folder, self._identity(first), say) as journal:
                self._measure(conditions, journal)
                self._baseline = journal.results()
                self._write(self._baseline, self._baseline_folder)
        return self._baseline

    def run(self, cartridge: Any, out: Path) -> dict[str, Any]:
        """Measures a trained cartridge; writes the folder and returns its summary.

        Args:
            cartridge: the ``TrainableCache``.
            out: where ``evaluation.json`` and its tables are written.
        """
        baseline = self.baseline()
        with torch.no_grad():
            prefix: Prefix = cartridge.prefix()
        conditions = [Fixed(TRAINED, prefix)]
        with Journal(out, self._identity(cartridge), say) as journal:
            if not journal.results().questions:
                more = baseline.measures
                journal.add(
                    [*baseline.questions, *baseline.prompts, *more.texts, *more.off_context]
                )
            self._measure(conditions, journal)
            summary = self._write(journal.results(), out)
            journal.remove()
        return summary

    def _measure(self, conditions: Sequence[Condition], journal: Journal) -> None:
        common = (self._model, self._tokenizer)
        harness = Evaluation(*common, self._document, conditions, seed=EVALUATION_SEED)
        harness.run(self.data.questions, [], journal)
        grid = self._grid
        if OWN_TEXT in grid.measures:
            sampling = answers.Sampling(grid.temperature, grid.measure_tokens, EVALUATION_SEED)
            OwnTexts(*common, self._document, conditions, self.data.questions, sampling).run(
                journal
            )
        if OFF_CONTEXT in grid.measures:
            OffContextPrompts(*common, conditions, self.data.documents.ids, EVALUATION_SEED).run(
                journal
            )

    def _write(self, results: Results, out: Path) -> dict[str, Any]:
        grid = self._grid
        described = {
            "model": self._name,
            "model_revision": None,
            "cartridge": None,
            "versions": versions(),
            "measures": {
                "groups": sorted(grid.measures),
                "temperature": grid.temperature,
                "tokens": grid.measure_tokens,
            },
        }
        summary = summarise(results, described, EVALUATION_SEED)
        summary["samples"] = []
        results.write(out)
        write_summary(out, summary)
        return summary

    def _identity(self, cartridge: Any) -> dict[str, Any]:
        """What the rows depend on: what a journal must agree with."""
        documents = self.data.documents
        return {
            "model weights": self._weights,
            "cartridge": digest(weights_checksum(cartridge)),
            "documents": digest({name: documents.text(name) for name in documents.ids}),
            "questions": digest([asdict(question) for question in self.data.questions]),
            "measures": [*sorted(self._grid.measures), self._grid.measure_tokens],
            "temperature": self._grid.temperature,
            "seed": EVALUATION_SEED,
            "versions": versions(),
        }
