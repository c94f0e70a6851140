"""The embedded server's chat paths, with cartridges and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from cartridge_distill.rollout.fingerprint import decode_fingerprint
from cartridge_distill.server.running import BackgroundServer
from tests.conftest import StartServer
from tests.server.asking import CHAT, local, post
from tests.tiny import plain_logprobs, random_cartridge, write_cartridge


def test_chat(start_server: StartServer, llama: PreTrainedModel, tmp_path: Path) -> None:
    cartridge = random_cartridge(llama)
    write_cartridge(cartridge, tmp_path, "a")
    server = start_server()
    messages = [{"role": "user", "content": "Hi"}]
    body: dict[str, Any] = {"messages": messages, "temperature": 0, "logprobs_in_fingerprint": True}
    answer = post(server, CHAT, cartridges=local("a"), max_tokens=5, **body)
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert content["object"] == "chat.completion"
    assert content["choices"][0]["message"]["role"] == "assistant"
    [choice] = decode_fingerprint(content["system_fingerprint"], ["stop"])
    prompt = list(server.service.tokenizer("<user>Hi\n<assistant>").input_ids)
    wanted = plain_logprobs(llama, cartridge.prefix(), prompt, choice.token_ids)
    assert choice.logprobs == pytest.approx(wanted, abs=1e-5, rel=0)
    started = [*messages, {"role": "assistant", "content": "It is"}]
    for path in (CHAT, "/v1/chat/completions"):
        answer = post(server, path, max_completion_tokens=3, **(body | {"messages": started}))
        prompt = list(server.service.tokenizer("<user>Hi\n<assistant>It is").input_ids)
        [choice] = decode_fingerprint(answer.json()["system_fingerprint"], ["stop"])
        assert choice.logprobs == pytest.approx(
            plain_logprobs(llama, None, prompt, choice.token_ids), abs=1e-5, rel=0
        )
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    with_logprobs = {"messages": parts, "max_tokens": 2, "logprobs": True, "top_logprobs": 0}
    answer = post(server, "/v1/chat/completions", **with_logprobs)
    listed = answer.json()["choices"][0]["logprobs"]["content"]
    assert len(listed) == 2 and all(entry["logprob"] <= 0 for entry in listed)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "exactly one"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "exactly one"),
        ({"max_tokens": 1, "messages": []}, "empty"),
        ({"max_tokens": 1, "top_logprobs": 2}, "logprobs must be true"),
        ({"max_tokens": 1, "logprobs": True, "top_logprobs": 2}, "max_topk_logprobs"),
    ],
)
def test_chat_refusals(refusing_server: BackgroundServer, body: dict[str, Any], says: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    answer = post(refusing_server, CHAT, **({"messages": messages} | body))
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["detail"]


def test_streamed_chat_is_one_finished_answer(refusing_server: BackgroundServer) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    plain = post(refusing_server, "/v1/chat/completions", temperature=0, **body).json()
    answer = post(refusing_server, "/v1/chat/completions", temperature=0, stream=True, **body)
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line)["choices"][0] for line in lines[:-1]]
    text = "".join(chunk["delta"].get("content", "") for chunk in chunks)
    assert text == plain["choices"][0]["message"]["content"]
    assert chunks[-1]["finish_reason"] == "length"
