"""What OpenAI's chat API offers: every answer as OpenAI's own client types have it."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cartridge_distill.model.prompts import render_prompt
from cartridge_distill.server.running import BackgroundServer
from tests.server.openai import strict
from tests.server.openai.conftest import BASE, CARTRIDGES
from tests.tiny import plain_distributions, random_cartridge

ASK: dict[str, Any] = {
    "model": "anna",
    "messages": [{"role": "user", "content": "What is it?"}],
    "max_completion_tokens": 24,
    "temperature": 0,
}


def greedy(model: PreTrainedModel, prompt: list[int], length: int) -> list[int]:
    """The tokens that follow behind the first cartridge, by plain forwards."""
    prefix, new = random_cartridge(model, 16, 0).prefix(), list[int]()
    for _ in range(length):
        new.append(int(plain_distributions(model, prefix, prompt, [*new, 0])[-1].argmax()))
    return new


def joined(chunks: list[Any], index: int = 0) -> str:
    return "".join(
        choice.delta.content or ""
        for chunk in chunks
        for choice in chunk.choices
        if choice.index == index
    )


def test_models_are_listed_and_found_one_by_one(
    served: BackgroundServer, client: openai.OpenAI
) -> None:
    listed = httpx.get(f"{served.url}/v1/models").json()
    assert listed["object"] == "list"
    cards = [strict.model(card) for card in listed["data"]]
    assert [card.id for card in cards] == [BASE, *CARTRIDGES]
    for card in cards:
        assert client.models.retrieve(card.id) == card  # names with slashes, too
    with pytest.raises(openai.NotFoundError, match="'carl' is not here; here are: org/base, anna"):
        client.models.retrieve("carl")


def test_an_answer_and_its_log_probs(
    served: BackgroundServer, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Text, tokens and log-probs against plain forwards; the bytes add up to the text."""
    answer = strict.completion(strict.post(served.url, **ASK, logprobs=True, top_logprobs=3))
    prompt = render_prompt(tokenizer, ASK["messages"])
    ids = greedy(llama, prompt, 24)
    [choice] = answer.choices
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert choice.message.content == text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == len(prompt) + 24
    assert choice.logprobs is not None and choice.logprobs.content is not None
    entries = choice.logprobs.content
    raw = bytes(byte for entry in entries for byte in entry.bytes or ())
    assert raw.decode(errors="replace") == text
    prefix = random_cartridge(llama, 16, 0).prefix()
    wanted = plain_distributions(llama, prefix, prompt, ids)
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    for entry, row, token in zip(entries, wanted, ids, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-5)
        values, places = torch.topk(row, 3)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
            values.tolist(), abs=1e-5
        )
        tops = [top.bytes for top in entry.top_logprobs]
        pieces = tokenizer.convert_ids_to_tokens(places.tolist())
        assert tops == [[letters[piece]] if piece in letters else None for piece in pieces]
    partial = [e for e in entries if e.bytes and len(e.bytes) == 1 and e.bytes[0] > 127]
    assert partial and all(e.token == f"bytes:\\x{e.bytes[0]:02x}" for e in partial if e.bytes)


@pytest.mark.parametrize("name", ["anna", BASE])
def test_a_stream_is_the_whole_answer_in_pieces(
    served: BackgroundServer, client: openai.OpenAI, name: str
) -> None:
    asked = ASK | {"model": name, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = strict.completion(strict.post(served.url, **asked))
    usage = {"include_usage": True}
    chunks = strict.chunks(strict.post(served.url, **asked, stream=True, stream_options=usage))
    for index, choice in enumerate(whole.choices):
        mine = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert joined(chunks, index) == choice.message.content
        assert mine[0].delta.role == "assistant"
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert choice.logprobs is not None and choice.logprobs.content is not None
        entries = [e for c in mine if c.logprobs for e in c.logprobs.content or ()]
        assert [e.token for e in entries] == [e.token for e in choice.logprobs.content]
        assert [e.bytes for e in entries] == [e.bytes for e in choice.logprobs.content]
        assert [e.logprob for e in entries] == pytest.approx(
            [e.logprob for e in choice.logprobs.content], abs=1e-5
        )
        assert len(mine) > 4
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])
    parsed = list(client.chat.completions.create(**asked, stream=True))  # type: ignore[call-overload]
    assert joined(parsed, 1) == whole.choices[1].message.content
    assert not any("usage" in chunk.model_fields_set for chunk in parsed)


def test_the_prompt_counts_once(served: BackgroundServer) -> None:
    one = strict.completion(strict.post(served.url, **ASK)).usage
    three = strict.completion(strict.post(served.url, **ASK, n=3)).usage
    assert one is not None and three is not None
    assert three.prompt_tokens == one.prompt_tokens
    assert three.completion_tokens == 3 * one.completion_tokens
    assert three.total_tokens == three.prompt_tokens + three.completion_tokens
    assert three.prompt_tokens_details is not None
    assert three.prompt_tokens_details.cached_tokens == 0  # one of the three computed it


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"stop": ""}, True),
        ({"stop": None}, True),
        ({"stop": []}, True),
        ({"stop": ["", "never this"]}, True),
        ({"stop": ["a", "b", "c", "d"]}, True),
        ({"response_format": {"type": "text"}}, True),
        ({"tools": [], "tool_choice": "none", "parallel_tool_calls": True}, True),
        ({"functions": [], "function_call": "auto"}, True),
        ({"store": True, "user": "u", "metadata": {"a": "b"}, "safety_identifier": "s"}, True),
        ({"prompt_cache_key": "k", "prompt_cache_retention": "24h", "service_tier": "auto"}, True),
        ({"top_p": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}}, True),
        ({"modalities": ["text"], "verbosity": "medium", "reasoning_effort": None}, True),
        ({"seed": 3, "n": None, "logprobs": None, "stream": None, "top_logprobs": None}, True),
        ({"messages": [{"role": "user", "content": "What is it?", "name": "anna"}]}, True),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "What is "},
                            {"type": "text", "text": "it?"},
                        ],
                    }
                ]
            },
            True,
        ),
        ({"messages": [*ASK["messages"], {"role": "assistant", "content": None}]}, True),
        ({"messages": [*ASK["messages"], {"role": "assistant", "content": ""}]}, True),
        ({"messages": [*ASK["messages"], {"role": "assistant", "content": "It"}]}, False),
    ],
)
@pytest.mark.parametrize("name", ["anna", BASE])
def test_what_asks_for_nothing_changes_nothing(
    served: BackgroundServer, changes: dict[str, Any], same: bool, name: str
) -> None:
    asked = ASK | {"model": name}
    if isinstance(changes.get("stop"), list) and len(changes["stop"]) == 4:
        text = strict.completion(strict.post(served.url, **asked)).choices[0].message.content
        changes = {"stop": [c for c in "qwertyuiopasdfghjklzxcvbnm" if c not in (text or "")][:4]}
    plain = strict.completion(strict.post(served.url, **asked)).choices[0]
    other = strict.completion(strict.post(served.url, **(asked | changes))).choices[0]
    assert (other == plain) == same


def test_roles_and_contents_are_rendered(
    served: BackgroundServer, tokenizer: PreTrainedTokenizerFast
) -> None:
    """As the prompt's length tells: a developer's message is a system message, null is empty."""
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "refusal": "No.", "tool_calls": None, "audio": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": "Why?"},
    ]
    rendered = "<system>Be brief.\n<user>Hi\n<assistant>No.\n<assistant>No.\n<user>Why?\n"
    for name in ("anna", BASE):
        asked = ASK | {"model": name, "messages": messages}
        answer = strict.completion(strict.post(served.url, **asked))
        assert answer.usage is not None
        ids = tokenizer(rendered + "<assistant>", add_special_tokens=False).input_ids
        assert answer.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize("last", ["system", "developer"])
def test_an_answer_follows_a_last_system_message(
    served: BackgroundServer, tokenizer: PreTrainedTokenizerFast, last: str
) -> None:
    """It is answered, and not gone on with."""
    messages = [*ASK["messages"], {"role": last, "content": "Be brief."}]
    rendered = tokenizer("<user>What is it?\n<system>Be brief.\n<assistant>").input_ids
    for name in ("anna", BASE):
        asked = ASK | {"model": name, "messages": messages}
        usage = strict.completion(strict.post(served.url, **asked)).usage
        assert usage is not None and usage.prompt_tokens == len(rendered)


def test_an_answer_of_the_client_can_be_sent_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(**ASK)
    message = first.choices[0].message
    history = [*ASK["messages"], message, {"role": "user", "content": "And then?"}]
    second = client.chat.completions.create(**ASK | {"messages": history})
    assert second.usage and first.usage
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    dumped = [*ASK["messages"], message.model_dump(), {"role": "user", "content": "And then?"}]
    third = client.chat.completions.create(**ASK | {"messages": dumped})
    assert third.choices == second.choices


def test_an_answer_without_a_bound_takes_what_is_left(served: BackgroundServer) -> None:
    """The context is 512 tokens; the prompt has 500 of them."""
    text = "x" * (500 - len("<user>\n<assistant>"))
    messages = [{"role": "user", "content": text}]
    asked = {"model": "anna", "messages": messages, "temperature": 0}
    answer = strict.completion(strict.post(served.url, **asked))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 500
    assert answer.usage.completion_tokens <= 12
    if answer.choices[0].finish_reason == "length":
        assert answer.usage.completion_tokens == 12


def test_the_same_seed_draws_the_same(served: BackgroundServer) -> None:
    def texts(**more: Any) -> list[str | None]:
        asked = ASK | {"temperature": None, "n": 2} | more
        answer = strict.completion(strict.post(served.url, **asked))
        return [choice.message.content for choice in answer.choices]

    assert texts(seed=1) == texts(seed=1, temperature=1)  # null is OpenAI's default, 1
    assert texts(seed=1) != texts(seed=2)
    assert texts(seed=-(2**63)) == texts(seed=-(2**63))
    assert texts() != texts()


def test_an_answer_that_ends_with_its_very_last_token_has_stopped(
    served: BackgroundServer, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """As stop string and as end token; a bound of one token less is too short."""
    ids = greedy(llama, render_prompt(tokenizer, ASK["messages"]), 24)
    texts = [tokenizer.decode(ids[: n + 1]) for n in range(24)]
    last = next(n for n in range(2, 24) if texts[n][-1].isascii() and texts[n][-1] not in texts[1])
    last = texts[23].index(texts[last][-1])  # characters of one byte only, up to here
    stop = texts[23][last]
    place = next(n for n in range(24) if stop in texts[n])
    for bound, reason in ((place + 1, "stop"), (place, "length")):
        asked = ASK | {"max_completion_tokens": bound, "stop": stop, "logprobs": True}
        answer = strict.completion(strict.post(served.url, **asked))
        chunks = strict.chunks(strict.post(served.url, **asked, stream=True))
        [choice] = answer.choices
        assert choice.finish_reason == reason
        assert chunks[-1].choices[0].finish_reason == reason
        assert choice.message.content == joined(chunks)
        assert stop not in (choice.message.content or "")
        assert choice.logprobs is not None
        assert len(choice.logprobs.content or ()) == place  # the stop's own token is no content
    ends = served.service.end_ids
    served.service.end_ids = frozenset([ids[place]])
    try:
        answer = strict.completion(
            strict.post(served.url, **ASK | {"max_completion_tokens": place + 1})
        )
    finally:
        served.service.end_ids = ends
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens == ids.index(ids[place]) + 1
