"""The scores by likelihood: figures that must come out, whatever the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.data.records import Question
from cartridge_distill.evaluation.conditions import Fixed, no_document
from cartridge_distill.evaluation.data import check_documents
from cartridge_distill.evaluation.names import FULL_DOCUMENT
from cartridge_distill.evaluation.prompts import AskedQuestion
from cartridge_distill.evaluation.scoring import (
    TeacherAnswers,
    continuation_logprobs,
    greedy_answers,
    kl_sums,
)
from cartridge_distill.model.attention import ATTENTION_NAME
from cartridge_distill.model.prefill import prefix_from_tokens
from cartridge_distill.model.prompts import render_document, render_prompt
from cartridge_distill.util.errors import CartridgeDistillError, ConfigError, DocumentError
from tests.evaluation.made import OPTIONS, QUESTIONS, TEXTS, evaluate, teacher
from tests.tiny import (
    CHAT_TEMPLATE,
    byte_tokenizer,
    plain_distributions,
    plain_logprobs,
    random_cartridge,
    tiny_model,
)


def document_prefix(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str
) -> Prefix:
    return prefix_from_tokens(model, torch.tensor(render_document(tokenizer, TEXTS[name])))


def test_the_document_itself_has_no_kl_and_other_prefixes_have(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    document, noise = document_prefix(packed, tokenizer, "two"), random_cartridge(packed).prefix()
    conditions = [no_document(packed, tokenizer), Fixed("same", document), Fixed("noise", noise)]
    results = evaluate(packed, tokenizer, tmp_path, conditions, QUESTIONS[1:], answer_tokens=6)
    rows = {name: results.of(name)[0] for name in results.conditions}
    assert list(rows) == ["no document", "same", "noise", FULL_DOCUMENT]
    for i in range(2):
        full, same = rows[FULL_DOCUMENT][i], rows["same"][i]
        assert full.kl_sum == 0 and same.kl_sum < 1e-5
        assert rows["no document"][i].kl_sum > 1e-3 and rows["noise"][i].kl_sum > 1e-3
        assert same.log_loss == pytest.approx(full.log_loss, abs=1e-4)
        assert same.likelihood_choice == full.likelihood_choice
        assert [rows[name][i].kv_tokens for name in rows] == [
            *(0, document.num_tokens, noise.num_tokens, document.num_tokens)
        ]
        assert full.question_index == i and full.right_answer == OPTIONS[2]


def test_figures_equal_the_plain_forward(
    llama: PreTrainedModel,
    packed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    cartridge = random_cartridge(packed).prefix()
    results = evaluate(packed, tokenizer, tmp_path, [Fixed("noise", cartridge)], answer_tokens=5)
    for question, row in zip(QUESTIONS, results.of("noise")[0], strict=True):
        document = document_prefix(packed, tokenizer, question.document_id)
        prompt = list(tokenizer(f"<user>{question.question}\n<assistant>").input_ids)
        start = [*prompt, *tokenizer(question.stem or "").input_ids]
        answer: list[int] = []
        while len(answer) < 5:
            logprobs = plain_distributions(llama, document, start, [*answer, 0])
            answer.append(int(logprobs[-1].argmax()))
            if answer[-1] == tokenizer.eos_token_id:
                break
        expected = plain_distributions(llama, document, start, answer)
        student = plain_distributions(llama, cartridge, start, answer)
        kl = float((expected.exp() * (expected - student)).sum())
        scores = []
        for option in OPTIONS:
            new = list(tokenizer(f" {option}" if question.stem else option).input_ids)
            scores.append(sum(plain_logprobs(llama, cartridge, start, new)) / len(new))
        assert row.kl_tokens == len(answer) and row.kl_sum == pytest.approx(kl, rel=1e-4)
        assert row.log_loss == pytest.approx(-scores[question.correct], rel=1e-4)
        assert row.likelihood_choice == max(range(5), key=scores.__getitem__)
        assert row.likelihood_correct == (row.likelihood_choice == question.correct)


@pytest.mark.parametrize("with_prefix", [True, False])
def test_continuations_equal_one_by_one(
    llama: PreTrainedModel, packed: PreTrainedModel, with_prefix: bool
) -> None:
    prefix = random_cartridge(packed).prefix() if with_prefix else None
    prompts = [[5, 9, 77, 3], [5, 9, 77, 3], [5, 9], [5, 9, 77, 3]]
    continuations = [[8], [8, 4, 200], [17, 1], [9]]
    scores = continuation_logprobs(packed, prefix, prompts, continuations)
    for score, prompt, ids in zip(scores, prompts, continuations, strict=True):
        expected = sum(plain_logprobs(llama, prefix, prompt, ids)) / len(ids)
        assert score == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("with_prefix", [True, False])
def test_greedy_answers_equal_step_by_step(
    llama: PreTrainedModel, packed: PreTrainedModel, with_prefix: bool
) -> None:
    prefix = random_cartridge(packed).prefix() if with_prefix else None
    prompts = [[1, 2, 3], [7], list(range(40, 52))]
    answers = greedy_answers(packed, [prefix] * 3, prompts, 6)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = plain_distributions(llama, prefix, prompt, answer).argmax(-1)
        assert answer == expected.tolist() and len(answer) == 6
    end = answers[0][2]
    (short,) = greedy_answers(packed, [prefix], prompts[:1], 6, frozenset([end]))
    assert short == answers[0][: answers[0].index(end) + 1]
    assert packed.config._attn_implementation == ATTENTION_NAME


def test_options_are_scored_from_the_end_of_the_stem(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = AskedQuestion.of(tokenizer, QUESTIONS[0])
    assert str(tokenizer.decode(asked.stem)).endswith("<assistant>Ann has")
    decoded = [str(tokenizer.decode(option)) for option in asked.options]
    assert decoded == [f" {text}" for text in OPTIONS]
    with pytest.raises(ConfigError, match="empty or null; fix: fill it"):
        Question("one", "What?", ("", "a", "b", "c", "d"), 1)


def test_what_cannot_be_evaluated_is_refused(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no evaluation questions"):
        evaluate(packed, tokenizer, tmp_path, [], [])
    strange = Question("three", "Who?", OPTIONS, 0)
    with pytest.raises(DocumentError, match="'three'"):
        evaluate(packed, tokenizer, tmp_path, [], [strange])
    parts = DocumentStore({"three#1": TEXTS["one"], "three#2": TEXTS["two"]})
    with pytest.raises(DocumentError, match="'three', which was cut into 2 parts"):
        check_documents([strange], parts)


def test_a_cartridge_that_diverged_is_an_error(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    document = document_prefix(packed, tokenizer, "one")
    told = TeacherAnswers.of(packed, document, [[5, 9]], 3, frozenset())
    broken = random_cartridge(packed)
    with torch.no_grad():
        broken.trainable_keys[0].fill_(float("nan"))
    with pytest.raises(CartridgeDistillError, match="diverged"):
        kl_sums(packed, broken.prefix(), told)


def test_the_full_document_is_read_once_for_all_its_questions(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    from cartridge_distill.evaluation.conditions import FullDocument

    reader = teacher(packed, tokenizer)
    document = FullDocument(reader)
    first = document.view("two")
    assert document.view("two") is first and reader.prefills == 1
    assert document.view("one") is not first and reader.prefills == 2


@pytest.mark.parametrize("begins", [True, False])
def test_no_document_is_the_model_as_it_always_begins(
    packed: PreTrainedModel, begins: bool
) -> None:
    """Scores of a prompt behind it are those of one plain sequence with the begin-of-text."""
    tokenizer = byte_tokenizer()
    if begins:
        tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    bos = [tokenizer.bos_token_id] if begins else []
    view = no_document(packed, tokenizer).view("two", "")
    assert list(view.ids or []) == bos and view.kv_tokens == len(bos)
    prompt, new = render_prompt(tokenizer, [{"role": "user", "content": "Who?"}]), [40, 41, 42]
    (found,) = continuation_logprobs(packed, view.prefix, [prompt], [new])
    model = tiny_model()
    expected = plain_logprobs(model, None, bos + prompt, new)
    assert found == pytest.approx(sum(expected) / 3, abs=1e-4)
    without = plain_logprobs(model, None, prompt, new)
    assert begins == (abs(found - sum(without) / 3) > 1e-3)
