"""What users write never becomes a control token, and ordinary text keeps its ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from cartridge_distill.data.prompt_recipes import cut_points
from cartridge_distill.data.records import Question
from cartridge_distill.evaluation.prompts import AskedQuestion
from cartridge_distill.model.contents import content_ids
from cartridge_distill.model.demo_model import FOLDER, cache_dir, verify
from cartridge_distill.model.prompts import render_document, render_prompt
from cartridge_distill.rollout.protocol import (
    CartridgeChatCompletionRequest,
    CartridgeRef,
    ChatCompletionRequest,
)
from cartridge_distill.server.protocol import Limits, to_job
from cartridge_distill.util.errors import ConfigError
from tests.model.templates import SHAPES, Shape, tokenizer_of
from tests.tiny import byte_tokenizer

ORDINARY = [
    "Her pet is a cat, called 1,024 & «Ünï»: 猫 🐈.",
    "  spaces \n\n\tand tabs\r\n",
    "a < b and c > d; <b>bold</b> [INS] <|im_en",
    "the token im_end, think, bos",
]


def names(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values()]


def controls(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    """The control tokens among the ids, in order."""
    added = tokenizer.added_tokens_decoder
    return [added[token].content for token in ids if token in added]


@pytest.fixture(params=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[str(request.param)]


def test_contents_that_name_control_tokens(shape: Shape) -> None:
    """Same control tokens as around an ordinary text, and every letter there."""
    tokenizer = tokenizer_of(shape)
    naughty = (
        "One ends a turn with " + " or ".join(names(tokenizer)) + "".join(names(tokenizer)) + "!"
    )

    def started(content: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": content}, {"role": "assistant", "content": content}]

    for render in (
        lambda content: render_document(tokenizer, content),
        lambda content: render_prompt(tokenizer, started(content)[:1]),
        lambda content: render_prompt(tokenizer, started(content)),
    ):
        ids, plain = render(naughty), render("DOC")
        assert controls(tokenizer, ids) == controls(tokenizer, plain)
        assert tokenizer.decode(ids) == tokenizer.decode(plain).replace("DOC", naughty)


def test_ordinary_text_has_the_ids_of_the_tokenizer(shape: Shape) -> None:
    tokenizer = tokenizer_of(shape)
    for text in ORDINARY:
        assert content_ids(tokenizer, text) == tokenizer(text, add_special_tokens=False).input_ids
        if shape.template is None:
            continue
        turns = [{"role": "system", "content": "S"}, {"role": "user", "content": text}]
        if any(words in shape.template for words in ("System role not supported", "no system")):
            turns = turns[1:]
        rendered = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
        )
        theirs = tokenizer(rendered, add_special_tokens=False).input_ids
        ours = render_prompt(tokenizer, turns)
        assert ours == theirs[len(theirs) - len(ours) :] and len(theirs) - len(ours) < 2  # bos


def test_the_demo_models_ids() -> None:
    """Ordinary text as before; a document about chat formats stays in its turn."""
    folder: Path = cache_dir() / FOLDER
    if not folder.exists() or verify(folder) is not None:
        pytest.skip("the demo model is not in the cache; training/get_demo_model.py gets it")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ORDINARY:
        turn = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        system = f"<|im_start|>system\n{text}<|im_end|>\n"
        plain = [
            tokenizer(rendered, add_special_tokens=False).input_ids for rendered in (turn, system)
        ]
        assert render_prompt(tokenizer, [{"role": "user", "content": text}]) == plain[0]
        assert render_document(tokenizer, text) == plain[1]
    ids = render_document(tokenizer, "A turn ends with <|im_end|>, a file with <file_sep>.")
    assert controls(tokenizer, ids) == ["<|im_start|>", "<|im_end|>"]
    assert "with <|im_end|>, a file with <file_sep>." in tokenizer.decode(ids)
    # The letters are tokenised as the tokenizer itself does when told that they are letters.
    split = tokenizer("<|im_end|>", add_special_tokens=False, split_special_tokens=True).input_ids
    assert content_ids(tokenizer, "<|im_end|>") == split


def test_thoughts_leave_earlier_answers_and_stay_text_in_questions() -> None:
    tokenizer = tokenizer_of(SHAPES["thought_dropped"])
    turns = [
        {"role": "user", "content": "What does </think> end?"},
        {"role": "assistant", "content": "<think>Well.</think>A thought."},
        {"role": "user", "content": "<think>No</think>?"},
    ]
    ids = render_prompt(tokenizer, turns)
    assert controls(tokenizer, ids)[-1] == "<think>" and "Well." not in tokenizer.decode(ids)
    assert controls(tokenizer, ids).count("</think>") == 0


def test_a_text_may_hold_the_marks() -> None:
    tokenizer = tokenizer_of(SHAPES["qwen2"])
    text = "\ufdd0<|im_end|>\ufdd1\ufdd5"
    assert tokenizer.decode(content_ids(tokenizer, text)) == text
    with pytest.raises(ConfigError, match="U[+]FDD0 to U[+]FDEF"):
        content_ids(tokenizer, "".join(chr(code) for code in range(0xFDD0, 0xFDF0)))


def test_letters_that_a_normaliser_makes_a_control_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|end|>", normalized=True, special=True)]}
    )
    wide = "\uff1c|end|\uff1e"
    assert controls(tokenizer, tokenizer(wide, add_special_tokens=False).input_ids) == ["<|end|>"]
    assert controls(tokenizer, content_ids(tokenizer, wide)) == []


def test_tokens_that_take_the_space_beside_them_do_so_in_the_template_alone() -> None:
    tokenizer = tokenizer_of(SHAPES["phi3"])
    tokenizer.add_tokens([AddedToken("<|more|>", rstrip=True, lstrip=True, special=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} <|more|>\n{% endfor %}"

    def prompt(text: str) -> list[int]:
        return render_prompt(tokenizer, [{"role": "user", "content": text}])

    more = tokenizer.convert_tokens_to_ids("<|more|>")
    assert prompt("a")[1:] == prompt("a <|more|> b")[-1:] == [more]
    assert tokenizer.decode(prompt("a <|more|> b")[:-1]) == "a <|more|> b"


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """Its model has the control token as a word, and takes it whole."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in "</s>abc ")]
    inner = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=0))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


def test_a_tokenizer_that_cannot_tell_is_refused_by_name() -> None:
    tokenizer = unigram_tokenizer()
    assert content_ids(tokenizer, "abc") and content_ids(tokenizer, "x")  # unknown is no control
    with pytest.raises(ConfigError, match="'</s>'.*only read as its control token.*fast tokenizer"):
        render_document(tokenizer, "ab </s> c")
    slow = ByT5Tokenizer()
    assert content_ids(slow, "abc") == slow("abc", add_special_tokens=False).input_ids
    with pytest.raises(ConfigError, match="'</s>'.*ByT5Tokenizer"):
        content_ids(slow, "ab </s> c")


def test_word_tokens_in_brackets_are_words() -> None:
    """An added token that neither the tokenizer nor the template calls control stays one token."""
    tokenizer = tokenizer_of(SHAPES["qwen2"])
    tokenizer.add_tokens(["<table>"])
    table = tokenizer.convert_tokens_to_ids("<table>")
    assert table in content_ids(tokenizer, "a <table>")
    assert table in content_ids(tokenizer, "a <table> <|im_end|>")


# --- the places that take text from users ---------------------------------------------------------


def chat_ids(tokenizer: Any, cartridge: bool, content: str, **more: Any) -> list[int]:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 4,
    } | more
    request = ChatCompletionRequest.model_validate(body)
    if cartridge:
        refs = [CartridgeRef(id="c", source="local")]
        request = CartridgeChatCompletionRequest.model_validate(body | {"cartridges": refs})
    return to_job(request, tokenizer, Limits(4096, 100_000)).prompt_ids


@pytest.mark.parametrize("cartridge", [True, False])
@pytest.mark.parametrize("shape_name", ["smollm2", "gemma3", "thought_empty", "channels"])
def test_the_servers_chat(shape_name: str, cartridge: bool) -> None:
    tokenizer = tokenizer_of(SHAPES[shape_name])
    naughty = "".join(names(tokenizer))
    ids, plain = (chat_ids(tokenizer, cartridge, text) for text in (naughty, "DOC"))
    assert controls(tokenizer, ids) == controls(tokenizer, plain)
    assert tokenizer.decode(ids) == tokenizer.decode(plain).replace("DOC", naughty)


@pytest.mark.parametrize("shape_name", ["smollm2", "thought_dropped", "thought_empty", "channels"])
def test_a_started_answer_goes_on_at_one_place_with_and_without_cartridge(shape_name: str) -> None:
    """Without one, transformers itself says where an assistant's message is continued."""
    tokenizer = tokenizer_of(SHAPES[shape_name])
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "It is <|im_end|>"},
    ]
    bare, ours = (chat_ids(tokenizer, with_one, "", messages=turns) for with_one in (False, True))
    assert bare == ours


def test_what_a_client_gives_the_template_beside_messages() -> None:
    """The switches that are texts."""
    tokenizer = tokenizer_of(SHAPES["smollm2"])
    tokenizer.chat_template = (
        "{{ reasoning_effort }}{{ reasoning_effort }}<|im_start|>{{ messages[0].content }}"
    )
    ids, expected = (
        chat_ids(tokenizer, False, "Hi", apply_chat_template_overrides={"reasoning_effort": text})
        for text in ("a<|im_end|>", "a")
    )
    assert controls(tokenizer, ids) == controls(tokenizer, expected) == ["<|im_start|>"]
    assert tokenizer.decode(ids) == "a<|im_end|>a<|im_end|><|im_start|>Hi"


def test_an_evaluation_question() -> None:
    tokenizer = tokenizer_of(SHAPES["thought_empty"])
    options = ("<|im_end|>", "<|im_start|>")
    question = Question("d", "What ends a <think> turn?", options, 0, stem=None)
    asked = AskedQuestion.of(tokenizer, question)
    # The answer, which is scored, begins behind the thought.
    assert asked.prompt == asked.stem
    assert controls(tokenizer, asked.prompt)[-2:] == ["<think>", "</think>"]
    for ids, option in zip(asked.options, options, strict=True):
        assert tokenizer.decode(ids) == option and not controls(tokenizer, ids)


def test_cuts_of_a_sentence_about_control_tokens() -> None:
    tokenizer = tokenizer_of(SHAPES["thought_empty"])
    sentence = "Each turn ends with <|im_end|> and a </think> closes the thought before."
    starts = cut_points(tokenizer, sentence)
    assert any(start.endswith("</thi") for start in starts)
    user = {"role": "user", "content": "?"}
    shortest = render_prompt(tokenizer, [user, {"role": "assistant", "content": ""}])
    for start in starts:
        ids = render_prompt(tokenizer, [user, {"role": "assistant", "content": start}])
        assert controls(tokenizer, ids) == controls(tokenizer, shortest)
