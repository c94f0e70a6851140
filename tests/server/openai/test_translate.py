"""An OpenAI request as prompt tokens, with a template that closes every turn."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from cartridge_distill.server.openai.errors import ApiError
from cartridge_distill.server.openai.requests import ChatRequest
from cartridge_distill.server.openai.translate import to_protocol
from cartridge_distill.server.protocol import Limits, to_job
from tests.tiny import byte_tokenizer

CHATML = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


HI = said("user", "Hi")


@pytest.mark.parametrize("cartridge", [None, "cartridge0"])
@pytest.mark.parametrize(
    ("messages", "rendered"),
    [
        ([HI], "[user]Hi[end]\n[assistant]"),
        ([HI, said("assistant", None)], "[user]Hi[end]\n[assistant]"),
        ([HI, said("assistant", "")], "[user]Hi[end]\n[assistant]"),
        ([HI, said("assistant", "It")], "[user]Hi[end]\n[assistant]It"),
        ([said("developer", "Be"), HI], "[system]Be[end]\n[user]Hi[end]\n[assistant]"),
        ([HI, said("system", "Be")], "[user]Hi[end]\n[system]Be[end]\n[assistant]"),
    ],
)
def test_prompts(
    chatml: PreTrainedTokenizerFast,
    messages: list[dict[str, Any]],
    rendered: str,
    cartridge: str | None,
) -> None:
    request = ChatRequest.model_validate({"model": "m", "messages": messages})
    job = to_job(to_protocol(request, cartridge, 4), chatml, Limits(512, 259))
    assert chatml.decode(job.prompt_ids) == rendered
    assert [ref.id for ref in job.cartridges] == ([cartridge] if cartridge else [])
    assert (job.max_new_tokens, job.temperature, job.num_choices, job.stop) == (4, 1.0, 1, [])


def test_nothing_but_an_empty_answer_is_refused() -> None:
    request = ChatRequest.model_validate({"model": "m", "messages": [said("assistant", None)]})
    with pytest.raises(ApiError, match="only an empty answer"):
        to_protocol(request, None, 4)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"stop": ["x" * 3000]}, "stop"),
        ({"messages": [{"role": "user", "content": "Who?"}] * 5000}, "messages"),
    ],
)
def test_what_is_beyond_the_protocols_bounds_is_the_clients_mistake(
    change: dict[str, Any], param: str
) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Who?"}]} | change
    with pytest.raises(ApiError, match=f"Invalid '{param}'.* at most") as refused:
        to_protocol(ChatRequest(**body), None, 5)
    assert (refused.value.status, refused.value.param) == (400, param)
