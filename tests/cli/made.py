"""A run's folder as training leaves it, for the commands that use one."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedModel

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, save_cartridge
from cartridge_distill.data.records import Question, save_questions, sha256_of
from cartridge_distill.model.identity import weights_fingerprint
from tests.tiny import random_cartridge

DOCUMENT = "The harbour master keeps the keys. He sings in the choir.\n" * 3
QUESTIONS = ("Who keeps the keys?", "Where does he sing?")


def made_run(model_folder: Path, model: PreTrainedModel, run: Path, seed: int = 0) -> Path:
    """A run with data, a recipe and a random cartridge; returns its folder."""
    data = run / "data"
    data.mkdir(parents=True)
    documents = [{"document_id": "harbour", "text": DOCUMENT}, {"document_id": "b", "text": "B."}]
    (data / "documents.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    questions = [Question("harbour", text, ("yes", "no"), 0) for text in QUESTIONS]
    save_questions(data / "eval.json", [*questions, Question("b", "Not this?", ("a", "b"), 0)])
    (run / "metrics.jsonl").write_text("")
    meta = CartridgeMeta(
        base_model=str(model_folder),
        document_sha256=sha256_of(DOCUMENT),
        model_fingerprint=weights_fingerprint(model_folder),
    )
    save_cartridge(random_cartridge(model, seed=seed), run / "cartridge", meta)
    return run
