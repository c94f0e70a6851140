"""The evaluation's numbers against plain transformers, which knows nothing of this project.

The reference below writes the conversation out as text, tokenises it as one string, runs
``AutoModelForCausalLM`` with its own attention and takes a softmax. Questions of the demo, with no
document and with the full one. All of them on the real model, a minute or more, are left to
``make test-long``; that needs the folder that training/get_demo_model.py makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from cartridge_distill.data.records import Question
from cartridge_distill.evaluation.names import FULL_DOCUMENT, NO_DOCUMENT
from cartridge_distill.model.demo_model import FOLDER, cache_dir
from cartridge_distill.model.loading import load_model
from tests.evaluation import made
from tests.tiny import save_model, tiny_model

DEMO = Path(__file__).resolve().parents[2] / "cartridge_distill/data/examples/demo.json"
TINY_CHAT = ("<system>{}\n", "<user>{}\n<assistant>")
CHATML = (
    "<|im_start|>system\n{}<|im_end|>\n",
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
)
ANSWER_TOKENS = 12


def demo() -> tuple[str, list[dict[str, Any]]]:
    """The document's text and the questions, read from the JSON alone."""
    [patient] = json.loads(DEMO.read_text()).values()
    heading = f"Patient record of {patient['name']}, born {patient['birthday']}."
    texts = [text.strip() for text in patient["texts"].values()]
    document = "\n\n".join([f"{heading} Diagnosis: {patient['diagnosis']}.", *texts])
    return document, patient["questions"]


class Plain:
    """A model behind the beginning of a text; ``keep`` computes that beginning once."""

    def __init__(self, model: Any, tokenizer: Any, before: str, keep: bool) -> None:
        self.model, self.tokenizer, self.before = model, tokenizer, before
        self.kept = tokenizer(before).input_ids if keep and before else []
        self.cache = DynamicCache()
        if self.kept:
            model(torch.tensor([self.kept]), past_key_values=self.cache)

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(self.before + text).input_ids
        assert found[: len(self.kept)] == self.kept
        return found

    def logprobs(self, ids: list[int], last: int) -> Tensor:
        """``[last, V]``: the distributions of the last tokens of a whole sequence."""
        cache = self.cache if self.kept else DynamicCache()
        logits = self.model(torch.tensor([ids[len(self.kept) :]]), past_key_values=cache).logits[0]
        if self.kept:
            self.cache.crop(len(self.kept))
        return logits.float().softmax(-1).log()[-last - 1 : -1]

    def answer(self, ids: list[int], end: int) -> list[int]:
        new: list[int] = []
        while len(new) < ANSWER_TOKENS and end not in new:
            new.append(int(self.logprobs([*ids, *new, 0], 1)[0].argmax()))
        return new

    def options(self, start: str, question: dict[str, Any]) -> list[float]:
        scores = []
        stem = len(self.ids(start))
        for letter in "abcde":
            ids = self.ids(f"{start} {question[f'answer_{letter}']}")
            found = self.logprobs(ids, len(ids) - stem)
            new = torch.tensor(ids[stem:])
            scores.append(float(found.gather(1, new[:, None]).mean()))
        return scores


@torch.no_grad()
def compare(
    folder: Path, out: Path, chat: tuple[str, str], keep: bool, count: int | None = None
) -> float:
    """Holds each question's numbers against the reference; returns the largest difference.

    Args:
        keep: the reference computes the document once, in transformers' own cache.
        count: the first so many questions; all by default.
    """
    text, entries = demo()
    entries = entries[:count]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    keys = [f"answer_{letter}" for letter in "abcde"]
    questions = []
    for entry in entries:
        options = tuple(entry[key] for key in keys)
        right = options.index(entry["correct"])
        questions.append(Question("demo", entry["question"], options, right, entry["stem"]))
    ours = made.evaluate_text(load_model(folder), tokenizer, out, text, questions)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    document = Plain(model, tokenizer, chat[0].format(text), keep)
    nothing = Plain(model, tokenizer, "", keep=False)
    worst = 0.0
    for index, entry in enumerate(entries):
        start = chat[1].format(entry["question"]) + entry["stem"]
        with_document, without = document.ids(start), nothing.ids(start)
        answer = document.answer(with_document, tokenizer.eos_token_id)
        expected = document.logprobs([*with_document, *answer], len(answer))
        student = nothing.logprobs([*without, *answer], len(answer))
        kl = float((expected.exp() * (expected - student)).sum())
        for condition, plain in ((FULL_DOCUMENT, document), (NO_DOCUMENT, nothing)):
            row = ours.of(condition)[0][index]
            scores = plain.options(start, entry)
            right = keys.index(next(key for key in keys if entry[key] == entry["correct"]))
            wanted_kl = 0.0 if plain is document else kl
            assert row.kl_tokens == len(answer)
            assert row.kv_tokens == len(with_document) - len(without) or plain is nothing
            assert row.likelihood_correct == (max(scores) == scores[right])
            worst = max(worst, abs(row.log_loss + scores[right]))
            worst = max(worst, abs(row.kl_sum - wanted_kl) / len(answer))
    return worst


def test_questions_on_a_tiny_model(tmp_path: Path) -> None:
    """The first in one plain forward of document + prompt + continuation for each number.

    A dozen with the document's tokens computed once: the other way takes a minute.
    """
    save_model(tiny_model(max_position_embeddings=8192), tmp_path / "model")
    assert compare(tmp_path / "model", tmp_path / "one", TINY_CHAT, keep=False, count=1) < 1e-4
    assert compare(tmp_path / "model", tmp_path / "many", TINY_CHAT, keep=True, count=12) < 1e-4


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_question_on_the_real_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the document's tokens computed once, and the first question without."""
    folder = cache_dir() / FOLDER
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; training/get_demo_model.py makes it")
    assert compare(folder, tmp_path / "one", CHATML, keep=False, count=1) < 1e-4
    worst = compare(folder, tmp_path / "all", CHATML, keep=True)
    with capsys.disabled():
        print(f"\nlargest difference to plain transformers: {worst:.1e} nats per token")
    assert worst < 1e-4
