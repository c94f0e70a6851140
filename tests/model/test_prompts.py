"""Documents and prompts as token ids, under the chat templates of the field."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cartridge_distill.model.demo_model import FOLDER, cache_dir, verify
from cartridge_distill.model.prompts import (
    begin_of_text,
    render_alone,
    render_document,
    render_prompt,
)
from cartridge_distill.util.errors import ConfigError, DocumentError
from tests.model.templates import SHAPES, tokenizer_of

WHO = [{"role": "user", "content": "Who?"}]


def text(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


@pytest.fixture(params=list(SHAPES))
def shape_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_document_is_the_system_message_or_plain_text(shape_name: str) -> None:
    shape = SHAPES[shape_name]
    tokenizer = tokenizer_of(shape)
    assert text(tokenizer, render_document(tokenizer, "DOC")) == shape.document


def test_a_prompt_has_no_begin_of_text_and_no_system_prompt(shape_name: str) -> None:
    shape = SHAPES[shape_name]
    tokenizer = tokenizer_of(shape)
    assert text(tokenizer, render_prompt(tokenizer, WHO)) == shape.prompt


def test_a_started_answer_is_appended_verbatim(shape_name: str) -> None:
    shape = SHAPES[shape_name]
    tokenizer = tokenizer_of(shape)
    started = "  Dr. Ost\n"  # No template may trim it.
    ids = render_prompt(tokenizer, [*WHO, {"role": "assistant", "content": started}])
    assert text(tokenizer, ids) == (shape.answer or shape.prompt) + started
    head = render_prompt(tokenizer, [*WHO, {"role": "assistant", "content": ""}])
    assert ids[: len(head)] == head
    if shape.answer is None:
        assert head == render_prompt(tokenizer, WHO)


def test_earlier_turns_stay(shape_name: str) -> None:
    tokenizer = tokenizer_of(SHAPES[shape_name])
    ids = render_prompt(tokenizer, [*WHO, {"role": "assistant", "content": "Me."}, *WHO])
    rendered = text(tokenizer, ids)
    assert rendered.count("Who?") == 2 and rendered.count("Me.") == 1
    # There bos opens or ends turns, or there is none.
    if shape_name not in ("smollm2", "qwen2", "llama2", "olmo2"):
        assert tokenizer.bos_token_id not in ids


def test_the_default_system_prompt_is_really_there_without_us() -> None:
    tokenizer = tokenizer_of(SHAPES["smollm2"])
    plain = tokenizer.apply_chat_template(WHO, tokenize=False)
    assert "named SmolLM" in plain
    assert "named SmolLM" not in text(tokenizer, render_prompt(tokenizer, WHO))


def test_the_callers_own_system_message_is_kept_once() -> None:
    for name in ("smollm2", "llama3"):
        tokenizer = tokenizer_of(SHAPES[name])
        ids = render_prompt(tokenizer, [{"role": "system", "content": "Be short."}, *WHO])
        rendered = text(tokenizer, ids)
        assert rendered.count("system") == 1 and "Be short." in rendered
        assert not rendered.startswith("<|begin_of_text|>")


def test_a_tokenizer_that_adds_begin_of_text_has_it_before_the_document_alone() -> None:
    tokenizer = tokenizer_of(SHAPES["qwen2"])
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    document = render_document(tokenizer, "DOC")
    assert document[0] == bos and document.count(bos) == 1
    assert bos not in render_prompt(tokenizer, WHO)


def test_messages_from_a_parquet_file_come_as_an_array() -> None:
    tokenizer = tokenizer_of(SHAPES["llama3"])
    array = np.array([*WHO, {"role": "assistant", "content": "Dr."}], dtype=object)
    assert render_prompt(tokenizer, array) == render_prompt(tokenizer, list(array))


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "empty"),
        ([{"role": "assistant", "content": "I"}], "only a started"),
        ([{"role": "teacher", "content": "I"}], "'teacher'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "list"),
    ],
)
def test_bad_conversations_are_refused(messages: list[dict], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        render_prompt(tokenizer_of(SHAPES["llama3"]), messages)


def test_a_refusal_of_the_template_is_told() -> None:
    tokenizer = tokenizer_of(SHAPES["gemma2"])
    with pytest.raises(ConfigError, match=r"\[system, user\]: System role not supported"):
        render_prompt(tokenizer, [{"role": "system", "content": "Be short."}, *WHO])


def test_a_template_that_opens_a_thought_and_shows_no_answer_is_refused() -> None:
    tokenizer = tokenizer_of(SHAPES["thought_dropped"])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ raise_exception('No answers') }}{% endif %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<bot>' + thought }}{% endif %}"
    )
    answer = [*WHO, {"role": "assistant", "content": "I am"}]
    for opening in ("<think>\n", "[THINK]", "<|begin_of_thought|>\n", "<reasoning>"):
        template = tokenizer.chat_template.replace("thought", repr(opening))
        tokenizer_of_it = tokenizer_of(SHAPES["thought_dropped"])
        tokenizer_of_it.chat_template = template
        assert text(tokenizer_of_it, render_prompt(tokenizer_of_it, WHO)).endswith(opening)
        with pytest.raises(ConfigError, match="does not show where an answer begins"):
            render_prompt(tokenizer_of_it, answer)
    tokenizer.chat_template = tokenizer.chat_template.replace("+ thought", "")
    assert text(tokenizer, render_prompt(tokenizer, answer)) == "Who?<bot>I am"


def test_a_template_that_cannot_be_split_is_refused() -> None:
    tokenizer = tokenizer_of(SHAPES["phi3"])
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    for render in (
        lambda: render_document(tokenizer, "DOC"),
        lambda: render_prompt(tokenizer, WHO),
    ):
        with pytest.raises(ConfigError, match="differently when a conversation follows"):
            render()


def test_an_empty_document_is_refused() -> None:
    with pytest.raises(DocumentError, match="empty"):
        render_document(tokenizer_of(SHAPES["llama3"]), " \n")


def test_the_demo_model_itself() -> None:
    folder: Path = cache_dir() / FOLDER
    if not folder.exists() or verify(folder) is not None:
        pytest.skip("the demo model is not in the cache; training/get_demo_model.py gets it")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    assert text(tokenizer, render_document(tokenizer, "DOC")) == SHAPES["smollm2"].document
    assert text(tokenizer, render_prompt(tokenizer, WHO)) == SHAPES["smollm2"].prompt
    assert begin_of_text(tokenizer) == []  # so the bare model's figures stand


BEGINS = {
    **{
        "deepseek_r1": "<｜begin▁of▁sentence｜>",
        "qwen3": "",
        "mistral_v3": "<s>",
        "system_chapters": "",
    },
    "smollm2": "",  # its bos opens every message, and the prompt has it
    "qwen2": "",
    "llama3": "<|begin_of_text|>",
    "gemma2": "<bos>",
    "gemma3": "<bos>",
    "mistral": "<s>",
    "needs_user": "<s>",
    "none": "<s>",
    "glm4": "[gMASK]<sop>",
    "cohere": "<BOS_TOKEN>",
    "llama2": "",  # each turn begins with its bos, and the prompt has it
    "olmo2": "<|endoftext|>",  # also ends the assistant's turns
    "default_system": "",
    "default_system_after_bos": "<s>",
    "phi3": "<s>",
    "phi3_default": "",
    "thought_dropped": "",
    "thought_empty": "",
    "thought_chosen": "",
    "thought_closed": "<s>",
    "channels": "",
}


def test_what_the_model_always_begins_with(shape_name: str) -> None:
    """It is what a document begins with, and what no prompt does."""
    tokenizer = tokenizer_of(SHAPES[shape_name])
    begin, prompt = begin_of_text(tokenizer), render_prompt(tokenizer, WHO)
    assert text(tokenizer, begin) == BEGINS[shape_name]
    assert render_document(tokenizer, "DOC")[: len(begin)] == begin
    assert render_alone(tokenizer, WHO) == begin + prompt
    assert not set(begin) & set(prompt)


def test_a_begin_of_text_that_only_the_tokenizer_adds_stands_before_a_prompt_alone() -> None:
    """As before a document; and not where the template opens each turn with it."""
    for name, begins in (("qwen2", True), ("llama2", False)):
        tokenizer = tokenizer_of(SHAPES[name])
        if tokenizer.bos_token is None:
            tokenizer.add_special_tokens({"bos_token": "<s>"})
        bos = tokenizer.bos_token_id
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bos)]
        )
        assert begin_of_text(tokenizer) == ([bos] if begins else [])
        alone = render_alone(tokenizer, WHO)
        assert alone[0] == bos and alone.count(bos) == 1
