"""Validation inside training: the evaluation's numbers, and no trace in what is trained."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from cartridge_distill.data.records import Question, load_questions, save_questions
from cartridge_distill.evaluation.conditions import Fixed, FullDocument
from cartridge_distill.evaluation.harness import Evaluation
from cartridge_distill.evaluation.journal import Journal
from cartridge_distill.evaluation.results import estimates
from cartridge_distill.util.errors import ConfigError, DocumentError
from tests.verl.engine_rig import build_engine, process_group, questions_file, rollouts, step


def run(model: Path, folder: Path, validate: bool) -> tuple[list[float], list[Any], Any]:
    """Losses and scores of three steps; with ``validate``, validated before and after each."""
    folder.mkdir()
    questions = str(questions_file(folder)) if validate else None
    engine = build_engine(model, folder, eval_questions=questions)
    scores = [engine.validate()] if validate else []
    losses = []
    for number in range(3):
        losses.append(sum(step(engine, rollouts(engine, number))["loss"]))
        if validate:
            before = torch.get_rng_state(), random.getstate(), engine.teacher.prefills
            scores.append(engine.validate())
            after = torch.get_rng_state(), random.getstate(), engine.teacher.prefills
            assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    return losses, scores, engine


def test_training_is_the_same_with_and_without(model_folder: Path, tmp_path: Path) -> None:
    with process_group():
        losses, scores, engine = run(model_folder, tmp_path / "with", validate=True)
        plain, _, other = run(model_folder, tmp_path / "without", validate=False)
        assert losses == plain  # to the bit
        for name, tensor in engine.cartridge.state_dict().items():
            assert torch.equal(tensor, other.cartridge.state_dict()[name])
        assert len({score["kl"] for score in scores}) == 4  # of another cartridge each time
        assert engine.validate() == scores[-1]
        with pytest.raises(ConfigError, match="eval_questions is null"):
            other.validate()


def test_the_numbers_are_the_evaluations(model_folder: Path, tmp_path: Path) -> None:
    with process_group():
        _, scores, engine = run(model_folder, tmp_path / "run", validate=True)
        trained = Fixed("trained", engine.cartridge.prefix().to(dtype=engine.module.dtype))
        tokenizer = engine.model_config.tokenizer
        document = FullDocument(engine.teacher)
        evaluation = Evaluation(engine.module, tokenizer, document, [trained])
        questions = load_questions(tmp_path / "run" / "eval.json")
        with Journal(tmp_path / "out", {}, print) as journal:
            evaluation.run(questions, [], journal)
            found = estimates(journal.results(), "trained", 0)
        for name, value in scores[-1].items():
            estimate = found[name]
            assert estimate is not None and estimate.mean == pytest.approx(value, rel=1e-5)
        per_token = 259 * 4  # the vocabulary in float32
        tokens = sum(row.kl_tokens for row in journal.results().questions)
        assert engine.validation.kept_bytes == tokens * per_token


def test_a_question_about_no_document_stops_the_run_before_it_begins(
    model_folder: Path, tmp_path: Path
) -> None:
    save_questions(tmp_path / "eval.json", [Question("green", "Who?", ("a", "b"), 0)])
    with process_group(), pytest.raises(DocumentError, match="'green', which is not among"):
        build_engine(model_folder, tmp_path, eval_questions=str(tmp_path / "eval.json"))
