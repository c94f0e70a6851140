"""Chatting: the cartridge is the beginning of the cache, positions go on after it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, save_cartridge
from cartridge_distill.cli import chat, conversation
from cartridge_distill.evaluation.scoring import greedy_answers
from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.prompts import render_document, render_prompt
from cartridge_distill.util.errors import CartridgeFormatError
from tests.tiny import CHAT_TEMPLATE, byte_tokenizer, random_cartridge, tiny_model

QUESTION = [{"role": "user", "content": "Who?"}]


@pytest.mark.parametrize("kind", ["llama", "mistral_window", "gemma2", "gemma3"])
@pytest.mark.parametrize("with_cartridge", [True, False])
def test_a_reply_equals_greedy_decoding_behind_the_prefix(
    tokenizer: PreTrainedTokenizerFast, kind: str, with_cartridge: bool
) -> None:
    model = tiny_model(kind)
    packed = prepare_model(copy.deepcopy(model))
    cartridge = random_cartridge(model) if with_cartridge else None
    started = [*QUESTION, {"role": "assistant", "content": "It was"}]
    for messages in (QUESTION, started):
        prompt = render_prompt(tokenizer, messages)
        prefix = cartridge.prefix() if cartridge else None
        end = frozenset([model.generation_config.eos_token_id])
        (expected,) = greedy_answers(packed, [prefix], [prompt], 8, end)
        assert (
            conversation.reply(model, tokenizer, cartridge, messages, max_new_tokens=8) == expected
        )


def test_without_a_cartridge_the_model_begins_as_it_always_does(llama: PreTrainedModel) -> None:
    """With one, the cartridge stands there, and no second begin-of-text."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    packed, bos = prepare_model(copy.deepcopy(llama)), [tokenizer.bos_token_id]
    assert render_prompt(tokenizer, QUESTION)[:1] != bos
    cartridge, end = random_cartridge(llama), frozenset([llama.generation_config.eos_token_id])
    for given, prefix, before in ((None, None, bos), (cartridge, cartridge.prefix(), [])):
        prompt = before + render_prompt(tokenizer, QUESTION)
        (expected,) = greedy_answers(packed, [prefix], [prompt], 8, end)
        got = conversation.reply(llama, tokenizer, given, QUESTION, max_new_tokens=8)
        assert got == expected


def test_a_cartridge_of_another_model_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    cartridge = random_cartridge(model)
    model.config.num_hidden_layers = 3
    with pytest.raises(CartridgeFormatError, match="2 layers"):
        conversation.reply(model, tokenizer, cartridge, QUESTION)


@pytest.fixture
def arguments(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> list[str]:
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    meta = CartridgeMeta(base_model="tiny")
    save_cartridge(random_cartridge(llama), tmp_path / "cartridge", meta)
    model, cartridge = str(tmp_path / "model"), str(tmp_path / "cartridge")
    return ["--model", model, "--cartridge", cartridge, "--max-new-tokens", "4"]


def test_one_shot(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main([*arguments, "--prompt", "Who?", "--start", "It was"]) == 0
    assert capsys.readouterr().out.startswith("It was")


def test_it_says_what_the_document_would_have_taken(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    document = tmp_path / "record.txt"
    document.write_text("The harbour master keeps the keys. " * 20)
    assert chat.main([*arguments, "--prompt", "Who?", "--document", str(document)]) == 0
    said = capsys.readouterr().err
    tokens = len(render_document(byte_tokenizer(), document.read_text().strip()))
    assert "the cartridge takes 16 KV tokens" in said
    assert f"the document would have taken {tokens}, {tokens / 16:.1f}x" in said
    assert chat.main([*arguments, "--prompt", "?", "--document", "/nowhere/at/all"]) == 1


def test_a_conversation_keeps_its_turns(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["Who?", "When?"])
    turns: list[int] = []

    def ask(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    def reply(_model: object, _tokenizer: object, _cartridge: object, messages: list, *_: object):
        turns.append(len(messages))
        return [65]

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(conversation, "reply", reply)
    assert chat.main(arguments) == 0
    assert turns == [1, 3]


def test_bad_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main([*arguments, "--start", "It"]) == 1
    assert "--prompt" in capsys.readouterr().err
    assert chat.main([*arguments, "--temperature", "-1"]) == 1
    assert chat.main(["--model", "m", "--cartridge", "/nowhere/at/all", "--prompt", "?"]) == 1
