"""The measures of ``--measures``: planted conditions give the values that they must."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.data.records import Question
from cartridge_distill.evaluation import own_text
from cartridge_distill.evaluation.answers import Sampling
from cartridge_distill.evaluation.conditions import Condition, Fixed, FullDocument, no_document
from cartridge_distill.evaluation.journal import Journal
from cartridge_distill.evaluation.measure_rows import TEXTS
from cartridge_distill.evaluation.measures import SCORES, MeasureRows, curve, measured
from cartridge_distill.evaluation.names import FULL_DOCUMENT, NO_DOCUMENT
from cartridge_distill.evaluation.off_context import OffContextPrompts
from cartridge_distill.evaluation.own_text import OwnTexts
from cartridge_distill.model.prefill import prefix_from_tokens
from cartridge_distill.model.prompts import render_document
from cartridge_distill.util.errors import CartridgeDistillError, ConfigError
from tests.evaluation.made import QUESTIONS, teacher
from tests.evaluation.made import TEXTS as DOCUMENTS
from tests.tiny import plain_distributions, random_cartridge

TOKENS = 24
ABOUT_TWO = QUESTIONS[1:]  # one with a stem and one without: 4 + 2 texts


def document_prefix(model: Any, tokenizer: Any, name: str = "two") -> Prefix:
    return prefix_from_tokens(model, torch.tensor(render_document(tokenizer, DOCUMENTS[name])))


def own_texts(
    model: Any,
    tokenizer: Any,
    folder: Path,
    conditions: list[Condition],
    questions: list[Question] = ABOUT_TWO,
    tokens: int = TOKENS,
) -> MeasureRows:
    """The given conditions and the full document, last."""
    document = FullDocument(teacher(model, tokenizer))
    sampling = Sampling(0.7, tokens, 3)
    every = [*conditions, document]
    texts = OwnTexts(model, tokenizer, document, every, questions, sampling)
    with Journal(folder, {}, print) as journal:
        texts.run(journal)
        found = journal.results().measures
    assert len(found.texts) == texts.texts
    return found


def value(rows: MeasureRows, condition: str, score: str) -> float:
    ratio = SCORES[score](rows.of(condition))
    assert ratio is not None
    return ratio.value


def test_a_condition_that_copies_the_teacher(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    same = Fixed("same", document_prefix(packed, tokenizer))
    noise = Fixed("noise", random_cartridge(packed).prefix())
    rows = own_texts(packed, tokenizer, tmp_path, [same, noise])
    for score in ("student_kl", "student_reverse_kl"):
        assert value(rows, "same", score) < 1e-5 and value(rows, FULL_DOCUMENT, score) == 0
        assert value(rows, "noise", score) > 1e-3
    assert value(rows, "same", "topk_overlap") == pytest.approx(1)
    assert value(rows, FULL_DOCUMENT, "topk_overlap") == pytest.approx(1)
    assert value(rows, "noise", "topk_overlap") < 0.99
    for score in ("student_entropy", "answer_tokens", "repetition", "ended", "topk_overlap_mass"):
        full = value(rows, FULL_DOCUMENT, score)
        assert value(rows, "same", score) == pytest.approx(full, abs=1e-4)
    same_texts = [row.text for row in rows.of("same").texts]
    assert same_texts == [row.text for row in rows.of(FULL_DOCUMENT).texts]


def test_every_number_is_that_of_the_plain_forward(
    llama: PreTrainedModel,
    packed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    noise = random_cartridge(packed).prefix()
    rows = own_texts(packed, tokenizer, tmp_path, [Fixed("noise", noise)]).of("noise").texts
    assert [(row.start, row.sampling) for row in rows] == [*TEXTS, *TEXTS[:2]]
    document = document_prefix(packed, tokenizer)
    for row in rows:
        question = ABOUT_TWO[row.question_index]
        begun = f"<user>{question.question}\n<assistant>"
        begun += question.stem or "" if row.start == "started" else ""
        prompt = list(tokenizer(begun).input_ids)
        ids: list[int] = []
        if row.sampling == "greedy":
            while len(ids) < TOKENS and tokenizer.eos_token_id not in ids:
                ids.append(int(plain_distributions(llama, noise, prompt, [*ids, 0])[-1].argmax()))
            assert tokenizer.decode(ids, skip_special_tokens=True) == row.text
        else:  # the tiny model's random text does not survive as text: its tokens are its bytes
            continue
        p, q = (plain_distributions(llama, prefix, prompt, ids) for prefix in (document, noise))
        assert row.kl == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), rel=1e-3, abs=1e-5)
        reverse = (q.exp() * (q - p)).sum(-1).tolist()
        assert row.reverse_kl == pytest.approx(reverse, rel=1e-3, abs=1e-5)
        assert row.entropy == pytest.approx(float(-(q.exp() * q).sum()), rel=1e-4)
        shared = [
            set(a.topk(20).indices.tolist()) & set(b.topk(20).indices.tolist())
            for a, b in zip(p, q, strict=True)
        ]
        assert row.overlap == pytest.approx(sum(len(each) for each in shared) / 20)
        masses = [
            float(a.exp()[list(each)].sum() + b.exp()[list(each)].sum()) / 2
            for each, a, b in zip(shared, p, q, strict=True)
        ]
        assert row.overlap_mass == pytest.approx(sum(masses), rel=1e-4)


def sure_of(model: PreTrainedModel, token: int) -> PreTrainedModel:
    """The model with a head that says one token, whatever it has read."""
    stuck = copy.deepcopy(model)
    head = stuck.get_output_embeddings()
    head.register_forward_hook(
        lambda module, inputs, logits: torch.zeros_like(logits).index_fill(
            -1, torch.tensor([token]), 30.0
        )
    )
    return stuck


def test_a_model_that_repeats_one_token(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    stuck = sure_of(packed, 77)
    rows = own_texts(stuck, tokenizer, tmp_path, [no_document(stuck, tokenizer)])
    expected = {
        "repetition": (TOKENS - 4) / (TOKENS - 3),  # all 4-grams but the first
        "ended": 0.0,
        "answer_tokens": TOKENS,
        "generated_match": 0.0,
        "student_kl": 0.0,
        "student_entropy": 0.0,
        "topk_overlap_mass": 1.0,
    }
    for score, number in expected.items():
        assert value(rows, NO_DOCUMENT, score) == pytest.approx(number, abs=1e-5), score


def test_a_model_that_ends_at_once(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    silent = sure_of(packed, int(tokenizer.eos_token_id))
    rows = own_texts(silent, tokenizer, tmp_path, [no_document(silent, tokenizer)])
    assert value(rows, NO_DOCUMENT, "ended") == 1 and value(rows, NO_DOCUMENT, "answer_tokens") == 1
    assert SCORES["repetition"](rows.of(NO_DOCUMENT)) is None  # no 4-gram to repeat
    assert SCORES["student_kl_5_16"](rows.of(NO_DOCUMENT)) is None
    assert {row.text for row in rows.texts} == {""}


def test_the_bands_and_the_curve_add_up(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    noise = Fixed("noise", random_cartridge(packed).prefix())
    rows = own_texts(packed, tokenizer, tmp_path, [noise]).of("noise")
    whole = SCORES["student_kl"](rows)
    bands = [SCORES[f"student_kl_{band}"](rows) for band in ("1_4", "5_16", "17_64", "65_256")]
    assert whole is not None and bands[-1] is None  # no text is as long
    assert sum(sum(b.values) for b in bands if b) == pytest.approx(sum(whole.values))
    points = curve(rows, 0)
    assert [(p["first"], p["last"]) for p in points][:6] == [
        *((1, 1), (2, 2), (3, 3), (4, 4)),
        *((5, 6), (7, 8)),
    ]
    assert points[-1]["last"] >= TOKENS and points[0]["tokens"] == len(rows.texts)
    nats = sum(p["student_kl"]["mean"] * p["tokens"] for p in points)
    assert nats == pytest.approx(sum(whole.values))
    first = [row.kl[0] for row in rows.texts]
    assert points[0]["student_kl"]["mean"] == pytest.approx(sum(first) / len(first))


def test_how_many_texts_are_scored_at_once_makes_no_difference(
    packed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noise: list[Condition] = [Fixed("noise", random_cartridge(packed).prefix())]
    whole = own_texts(packed, tokenizer, tmp_path / "whole", noise)
    monkeypatch.setattr(own_text, "SCORED_AT_ONCE", 1)
    alone = own_texts(packed, tokenizer, tmp_path / "alone", noise)
    for one, other in zip(whole.texts, alone.texts, strict=True):
        assert one.text == other.text
        assert one.kl == pytest.approx(other.kl, abs=1e-4)
    assert list(own_text.few_tokens(range(3), lambda place: 5)) == [[0], [1], [2]]


def test_a_stopped_one_goes_on(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    noise: list[Condition] = [Fixed("noise", random_cartridge(packed).prefix())]
    whole = own_texts(packed, tokenizer, tmp_path / "whole", noise, tokens=5)
    document = FullDocument(teacher(packed, tokenizer))
    texts = OwnTexts(
        packed, tokenizer, document, [*noise, document], ABOUT_TWO, Sampling(0.7, 5, 3)
    )

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 4:  # of one condition the free texts
            raise Stop

    with Journal(tmp_path / "stopped", {}, print) as journal, pytest.raises(Stop):
        texts.run(journal, stop)
    steps: list[tuple[int, int]] = []
    with Journal(tmp_path / "stopped", {}, print) as journal:
        assert 0 < len(journal.results().measures.texts) < len(whole.texts)
        texts.run(journal, lambda done, total: steps.append((done, total)))
        found = journal.results().measures
    assert sorted(map(repr, found.texts)) == sorted(map(repr, whole.texts))
    assert steps[-1] == (len(whole.texts), len(whole.texts))


def test_a_text_over_the_context_is_refused(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="lower --measure-tokens"):
        own_texts(packed, tokenizer, tmp_path, [], tokens=100_000)


def test_a_cartridge_that_diverged_is_an_error(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    broken = random_cartridge(packed)
    with torch.no_grad():
        broken.trainable_keys[0].fill_(float("nan"))
    with pytest.raises(CartridgeDistillError, match="not finite|diverged"):
        own_texts(packed, tokenizer, tmp_path, [Fixed("broken", broken.prefix())], tokens=3)


UNRELATED = ["What is two plus two?", "Say hello.", "Name a colour.", "Who wrote this?"]


def test_the_bare_model_is_not_changed_off_context_and_others_are(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    document = FullDocument(teacher(packed, tokenizer))
    bare = Fixed("bare", None)
    noise = Fixed("noise", random_cartridge(packed).prefix())
    conditions: list[Condition] = [no_document(packed, tokenizer), bare, noise, document]
    prompts = OffContextPrompts(
        packed, tokenizer, conditions, list(DOCUMENTS), chunk=3, texts=UNRELATED
    )
    with Journal(tmp_path, {}, print) as journal:
        prompts.run(journal)
        rows = journal.results().measures
        prompts.run(journal)  # nothing is left to do
    assert len(rows.off_context) == 4 * len(UNRELATED) and measured(rows) == ["off_context_kl"]
    for name in (NO_DOCUMENT, "bare"):
        assert value(rows, name, "off_context_kl") < 1e-5
    for name in ("noise", FULL_DOCUMENT):
        assert value(rows, name, "off_context_kl") > 1e-3
    read = [row.document_id for row in rows.of(FULL_DOCUMENT).off_context]
    assert read == ["one", "two", "one", "two"]


def test_the_divergence_off_context_is_the_plain_one(
    llama: PreTrainedModel,
    packed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    noise = random_cartridge(packed).prefix()
    prompts = OffContextPrompts(
        packed, tokenizer, [Fixed("noise", noise)], ["one"], texts=UNRELATED[:1]
    )
    with Journal(tmp_path, {}, print) as journal:
        prompts.run(journal)
        (row,) = journal.results().measures.off_context
    prompt = list(tokenizer(f"<user>{UNRELATED[0]}\n<assistant>").input_ids)
    ids: list[int] = []
    while len(ids) < row.kl_tokens:
        ids.append(int(plain_distributions(llama, None, prompt, [*ids, 0])[-1].argmax()))
    p, q = (plain_distributions(llama, prefix, prompt, ids) for prefix in (None, noise))
    assert row.kl_sum == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
