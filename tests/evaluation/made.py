"""What the tests of the evaluation evaluate: two short documents and questions about them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, save_cartridge
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.data.records import Document, Question, save_documents, save_questions
from cartridge_distill.distill.teacher import Teacher
from cartridge_distill.evaluation.conditions import Condition, FullDocument, no_document
from cartridge_distill.evaluation.harness import Evaluation
from cartridge_distill.evaluation.journal import Journal
from cartridge_distill.evaluation.results import Results
from cartridge_distill.model.prefill import prefix_from_tokens
from cartridge_distill.model.prompts import render_document

TEXTS = {
    "one": "Ann has a red hat. She lives by the sea with her dog.",
    "two": "Ben has a very old blue boat. He sold his car. The boat is called Moth.",
}
OPTIONS = ("a red hat", "a car", "an old blue boat", "x", "hats")
QUESTIONS = [
    Question("one", "What has Ann?", OPTIONS, 0, "Ann has"),
    Question("two", "What has Ben?", OPTIONS, 2, "The thing that Ben has is"),
    Question("two", "Has Ben a boat?", OPTIONS, 2),
]


def teacher(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Teacher:
    documents = DocumentStore(TEXTS)
    return Teacher(model, documents, partial(render_document, tokenizer), max_cached=1)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    conditions: list[Condition],
    questions: list[Question] | None = None,
    **settings: Any,
) -> Results:
    """The given conditions and the full document, last."""
    document = FullDocument(teacher(model, tokenizer))
    evaluation = Evaluation(model, tokenizer, document, [*conditions, document], **settings)
    with Journal(folder, {}, print) as journal:
        evaluation.run(QUESTIONS if questions is None else questions, [], journal)
        return journal.results()


def write_data(folder: Path, questions: list[Question]) -> Path:
    """A folder as ``cartridge-distill prepare`` writes it, less the prompts."""
    folder.mkdir()
    save_questions(folder / "eval.json", questions)
    save_documents(folder / "documents.jsonl", [Document.of(*item) for item in TEXTS.items()])
    return folder


def write_oracle(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, document_id: str, folder: Path
) -> Path:
    """A cartridge that is a whole document's KV."""
    ids = torch.tensor(render_document(tokenizer, TEXTS[document_id]))
    whole: Prefix = prefix_from_tokens(model, ids)
    save_cartridge(TrainableCache(whole), folder, CartridgeMeta(base_model="tiny"))
    return folder


def evaluate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    text: str,
    questions: list[Question],
) -> Results:
    """No document and the full one, of a document that is called "demo"."""
    documents = DocumentStore({"demo": text})
    document = FullDocument(Teacher(model, documents, partial(render_document, tokenizer)))
    evaluation = Evaluation(model, tokenizer, document, [no_document(model, tokenizer), document])
    with Journal(folder, {}, print) as journal:
        evaluation.run(questions, [], journal)
        return journal.results()
