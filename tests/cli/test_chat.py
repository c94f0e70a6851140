"""Chatting: the cartridge is the beginning of the cache, positions go on after it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.cli import chat, conversation
from cartridge_distill.evaluation.scoring import greedy_answers
from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.prefill import prefix_from_tokens
from cartridge_distill.model.prompts import render_document, render_prompt
from cartridge_distill.util.errors import CartridgeFormatError, ConfigError
from tests.cli.made import DOCUMENT, made_run
from tests.tiny import CHAT_TEMPLATE, byte_tokenizer, random_cartridge, save_model, tiny_model

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
        assert conversation.reply(model, tokenizer, prefix, messages, max_new_tokens=8) == expected


def test_without_a_cartridge_the_model_begins_as_it_always_does(llama: PreTrainedModel) -> None:
    """With one, the cartridge stands there, and no second begin-of-text."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    packed, bos = prepare_model(copy.deepcopy(llama)), [tokenizer.bos_token_id]
    assert render_prompt(tokenizer, QUESTION)[:1] != bos
    cartridge, end = random_cartridge(llama), frozenset([llama.generation_config.eos_token_id])
    for prefix, before in ((None, bos), (cartridge.prefix(), [])):
        prompt = before + render_prompt(tokenizer, QUESTION)
        (expected,) = greedy_answers(packed, [prefix], [prompt], 8, end)
        got = conversation.reply(llama, tokenizer, prefix, QUESTION, max_new_tokens=8)
        assert got == expected


@pytest.mark.parametrize("kind", ["llama", "mistral_window", "gemma3"])
def test_a_document_computed_in_pieces_is_the_teachers(
    tokenizer: PreTrainedTokenizerFast, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(kind)
    packed = prepare_model(copy.deepcopy(model))
    monkeypatch.setattr(conversation, "_AT_ONCE", 32)
    ids = render_document(tokenizer, "The harbour master keeps the keys. " * 4)
    prefix, teachers = conversation.document_prefix(model, ids), prefix_from_ids(packed, ids)
    for one, other in zip(
        prefix.keys + prefix.values, teachers.keys + teachers.values, strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    end = frozenset([model.generation_config.eos_token_id])
    (expected,) = greedy_answers(packed, [teachers], [render_prompt(tokenizer, QUESTION)], 8, end)
    assert conversation.reply(model, tokenizer, prefix, QUESTION, max_new_tokens=8) == expected


def prefix_from_ids(packed: PreTrainedModel, ids: list[int]) -> Prefix:
    return prefix_from_tokens(packed, torch.tensor(ids))


@pytest.mark.parametrize(
    ("ids", "round_"),
    [
        ([7] * 23, False),
        ([7] * 24, True),
        ([1, 2, 3] * 8, True),
        ([9, *[1, 2, 3] * 8], True),
        ([*[1, 2, 3] * 8, 9], False),
        (list(range(20)) * 2, False),
        ([5, *list(range(20)) * 3], True),
        ([], False),
    ],
)
def test_an_answer_that_goes_round_is_known(ids: list[int], round_: bool) -> None:
    assert conversation.repeats(ids) is round_


class Said(list):
    def __call__(self, text: str) -> None:
        self.append(text)


def talk(model: PreTrainedModel, **more: Any) -> conversation.Conversation:
    views = {"cartridge": random_cartridge(model).prefix(), "no document": None}
    return conversation.Conversation(model, byte_tokenizer(), views, **more)


def test_questions_stand_alone_unless_turns_are_asked_for(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def reply(*given: Any, **more: Any) -> list[int]:
        asked.append([message["content"] for message in given[3]])
        return [65]  # "b"

    monkeypatch.setattr(conversation, "reply", reply)
    for turns, last in ((0, ["z"]), (1, ["y", "b", "z"]), (9, ["x", "b", "y", "b", "z"])):
        talking = talk(llama, turns=turns, max_new_tokens=4)
        for question in "xyz":
            talking.ask("cartridge", question, Said())
        assert asked[-1] == last
        talking.ask("no document", "z", Said())
        assert asked[-1] == ["z"]  # what the other was asked is not its own
        talking.reset()
        talking.ask("cartridge", "d", Said())
        assert asked[-1] == ["d"]


def test_earlier_turns_are_left_out_when_the_context_is_full(llama: PreTrainedModel) -> None:
    talking = talk(llama, turns=50, max_new_tokens=4)
    asked = "Why? " * 8
    turn = len(render_prompt(byte_tokenizer(), [{"role": "user", "content": asked}]))
    talking.context = 16 + 4 + 2 * turn + 20  # the cartridge, an answer, two questions
    answers = [talking.ask("cartridge", asked, Said()) for _ in range(4)]
    assert [answer.left_out for answer in answers][:2] == [0, 0]
    assert answers[-1].left_out > 0
    talking.context = 16 + 4 + turn - 1
    with pytest.raises(ConfigError, match="1 tokens over the model's context"):
        talking.ask("cartridge", asked, Said())


def test_an_answer_is_handed_on_as_it_comes_and_can_be_stopped(llama: PreTrainedModel) -> None:
    talking = talk(llama, max_new_tokens=20)
    whole = Said()
    answer = talking.ask("cartridge", "Who?", whole)
    assert "".join(whole) == answer.text and len(whole) > 3 and answer.ended == "length"

    class Stops(Said):
        def __call__(self, text: str) -> None:
            super().__call__(text)
            talking.interrupted.set()

    said = Stops()
    stopped = talking.ask("cartridge", "Who?", said)
    assert stopped.ended == "interrupted" and stopped.tokens < 20
    assert answer.text.startswith(stopped.text.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_an_answer_that_goes_round_ends(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "repeats", lambda ids: len(ids) == 5)
    answer = talk(llama, max_new_tokens=20).ask("cartridge", "Who?", Said())
    assert (answer.ended, answer.tokens) == ("repeats", 5)


def test_a_cartridge_of_another_model_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    cartridge = random_cartridge(model)
    model.config.num_hidden_layers = 3
    with pytest.raises(CartridgeFormatError, match="2 layers"):
        conversation.reply(model, tokenizer, cartridge.prefix(), QUESTION)


@pytest.fixture
def arguments(model_folder: Path, llama: PreTrainedModel, tmp_path: Path) -> list[str]:
    """Of a cartridge in a run's folder, with its document and questions."""
    made_run(model_folder, llama, tmp_path / "mine")
    return [str(tmp_path / "mine"), "--max-new-tokens", "4"]


def test_one_shot(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main([*arguments, "--prompt", "Who?", "--start", "It was"]) == 0
    assert capsys.readouterr().out.startswith("It was")


def test_three_answers_and_what_each_takes(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat.main([*arguments, "--prompt", "Who?", "--compare"]) == 0
    out, err = capsys.readouterr()
    tokens = len(render_document(byte_tokenizer(), DOCUMENT))
    places = [out.index(f"{name} (") for name in ("no document", "cartridge", "full document")]
    assert places == sorted(places) and out.count("4 tokens in ") == 3
    assert f"full document ({tokens} KV tokens" in out
    assert "the cartridge takes 16 KV tokens" in err
    assert f"the document would have taken {tokens}, {tokens / 16:.1f}x" in err
    assert "warning" not in err


def test_a_named_document_goes_before_the_runs(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    document = tmp_path / "record.txt"
    document.write_text("Another text. " * 9)
    assert chat.main([*arguments, "--prompt", "Who?", "--document", str(document)]) == 0
    said = capsys.readouterr().err
    tokens = len(render_document(byte_tokenizer(), document.read_text().strip()))
    assert f"the document would have taken {tokens}" in said
    assert "is not the document that" in said


def test_a_twin_of_the_model_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    twin = tiny_model()
    with torch.no_grad():
        twin.model.layers[0].self_attn.q_proj.weight.mul_(1.1)
    save_model(twin, tmp_path / "twin")
    typed = [*arguments, "--prompt", "Who?", "--model", str(tmp_path / "twin")]
    assert chat.main(typed) == 1
    assert "trained with other weights" in capsys.readouterr().err
    assert chat.main([*typed, "--allow-other-model"]) == 0
    assert "its answers may mean nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["RUN", "--start", "It"], "--prompt"),
        (["RUN", "--temperature", "-1"], "--temperature"),
        (["RUN", "--turns", "-1"], "--turns"),
        (["RUN", "--threads", "0"], "--threads 0"),
        (["RUN", "--dtype", "int4"], "say auto, float32"),
        (["RUN", "--cartridge", "x/y"], "two cartridges"),
        (["RUN", "--document", "/nowhere/at/all"], "there is no such file"),
        (["RUN", "--model", "/nowhere/at/all"], "there is no such folder"),
        (["RUN", "--model", "EMPTY"], "no config.json"),
        (["RUNN"], "did you mean"),
        (["/nowhere/at/all"], "name a run's folder"),
        (["EMPTY", "--model", "MODEL"], "holds no cartridge"),
        (["TOKENS"], "does not say which model"),
        ([], "which model"),
        (["--model", "MODEL", "--compare"], "to compare with"),
        (["RUN", "--device", "gpu"], "no device's name"),
    ],
)
def test_what_a_user_does_wrong_is_one_line(
    arguments: list[str],
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    typed: list[str],
    said: str,
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"RUN": arguments[0], "RUNN": arguments[0] + "e", "MODEL": str(model_folder)}
    places["EMPTY"] = str(tmp_path / "empty")
    (tmp_path / "cartridge.pt").write_bytes(b"")  # a format that has no place for a model's name
    places["TOKENS"] = str(tmp_path / "cartridge.pt")
    assert chat.main([places.get(word, word) for word in typed]) == 1
    err = capsys.readouterr().err
    assert said in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_model_that_has_moved_is_named_with_the_fix(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(arguments[0]) / "cartridge" / "cartridge.json"
    described = json.loads(file.read_text()) | {"base_model": "/moved/away"}
    file.write_text(json.dumps(described))
    assert chat.main([*arguments, "--prompt", "?"]) == 1
    said = capsys.readouterr().err
    assert (
        "says that its model is /moved/away" in said
        and "name the folder where it lies with --model" in said
    )


def test_a_question_that_does_not_fit_ends_with_an_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    typed = [arguments[0], "--max-new-tokens", "600", "--prompt", "Who?"]
    assert chat.main(typed) == 1
    assert "over the model's context of 512" in capsys.readouterr().err
