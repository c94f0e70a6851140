"""Validation inside training: the evaluation's numbers, and no trace in what is trained."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from cartridge_distill.data.records import Question, load_questions, save_questions
from cartridge_distill.evaluation.answers import Sampling
from cartridge_distill.evaluation.conditions import Fixed, FullDocument
from cartridge_distill.evaluation.harness import Evaluation
from cartridge_distill.evaluation.journal import Journal
from cartridge_distill.evaluation.own_text import OwnTexts
from cartridge_distill.evaluation.results import estimates
from cartridge_distill.util.errors import ConfigError, DocumentError
from tests.verl.engine_rig import build_engine, process_group, questions_file, rollouts, step


def run(
    model: Path, folder: Path, validate: bool, own_text: int = 0
) -> tuple[list[float], list[Any], Any]:
    """Losses and scores of three steps; with ``validate``, validated before and after each."""
    folder.mkdir()
    questions = str(questions_file(folder)) if validate else None
    engine = build_engine(model, folder, eval_questions=questions, eval_own_text_tokens=own_text)
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
        losses, scores, engine = run(model_folder, tmp_path / "with", validate=True, own_text=6)
        plain, _, other = run(model_folder, tmp_path / "without", validate=False)
        assert losses == plain  # to the bit
        for name, tensor in engine.cartridge.state_dict().items():
            assert torch.equal(tensor, other.cartridge.state_dict()[name])
        for name in ("kl", "student_kl"):
            assert len({score[name] for score in scores}) == 4  # of another cartridge each time
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


def test_own_texts_are_scored_as_the_evaluation_scores_them(
    model_folder: Path, tmp_path: Path
) -> None:
    with process_group():
        _, scores, engine = run(model_folder, tmp_path / "run", validate=True, own_text=6)
        model, tokenizer = engine.module, engine.model_config.tokenizer
        trained = Fixed("trained", engine.cartridge.prefix().to(dtype=model.dtype))
        questions = load_questions(tmp_path / "run" / "eval.json")
        sampling = Sampling(temperature=0.7, max_new_tokens=6)
        document = FullDocument(engine.teacher)
        texts = OwnTexts(model, tokenizer, document, [trained], questions, sampling)
        with Journal(tmp_path / "out", {}, print) as journal:
            texts.run(journal)
            rows = journal.results().measures.texts
        greedy = [row for row in rows if (row.start, row.sampling) == ("free", "greedy")]
        assert len(greedy) == len(questions)
        nats = [value for row in greedy for value in row.kl]
        assert scores[-1]["student_kl"] == pytest.approx(sum(nats) / len(nats), rel=1e-4)
        late = [value for row in greedy for value in row.reverse_kl[4:]]
        assert scores[-1]["student_reverse_kl_5_16"] == pytest.approx(
            sum(late) / len(late), rel=1e-4
        )
        assert "student_kl_17_64" not in scores[-1]  # no text is so long
        assert 0 <= scores[-1]["generated_match"] <= 1
        assert engine.validation._document._kept is None  # the trainer needs its memory
        assert "student_kl" not in run(model_folder, tmp_path / "none", validate=True)[1][0]


def test_own_texts_over_the_context_are_refused_before_the_run(
    model_folder: Path, tmp_path: Path
) -> None:
    with process_group(), pytest.raises(ConfigError, match=r"fix: lower .*eval_own_text_tokens"):
        run(model_folder, tmp_path / "run", validate=True, own_text=100_000)


def test_a_question_about_no_document_stops_the_run_before_it_begins(
    model_folder: Path, tmp_path: Path
) -> None:
    save_questions(tmp_path / "eval.json", [Question("green", "Who?", ("a", "b"), 0)])
    with process_group(), pytest.raises(DocumentError, match="'green', which is not among"):
        build_engine(model_folder, tmp_path, eval_questions=str(tmp_path / "eval.json"))
