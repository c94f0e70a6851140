"""schemathesis against the description of OpenAI's chat API: what is sent is served or refused.

Bodies that fit the description are asked with a model that is here and a small bound; their answers
are held against the types of OpenAI's client. Bodies that do not fit must be refused.
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from cartridge_distill.server.running import BackgroundServer
from tests.server.openai import strict

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(900)]
CHAT = ("POST", "/v1/chat/completions")
OPERATIONS = {CHAT, ("GET", "/v1/models"), ("GET", "/v1/models/{model}"), ("GET", "/ping")}


@pytest.fixture(scope="module")
def schema(served: BackgroundServer) -> Any:
    made = schemathesis.openapi.from_dict(httpx.get(served.url + "/openapi.json").json())
    made.config.update(base_url=served.url)
    return made


def test_every_operation_is_described_and_tried(schema: Any) -> None:
    described = {
        (method.upper(), path)
        for path, methods in schema.raw_schema["paths"].items()
        for method in methods
    }
    assert described == OPERATIONS


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        *((method, path, GenerationMode.POSITIVE) for method, path in sorted(OPERATIONS)),
        (*CHAT, GenerationMode.NEGATIVE),
    ],
)
def test_the_chat_api_keeps_its_word(
    schema: Any, served: BackgroundServer, method: str, path: str, mode: GenerationMode
) -> None:
    operation = schema[path][method]
    statuses: list[int] = []

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=400 if (method, path) == CHAT else 20,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def holds(case: Any) -> None:
        positive = mode == GenerationMode.POSITIVE and isinstance(case.body, dict)
        if positive:
            case.body["model"] = "anna"
            case.body["n"] = min(case.body.get("n") or 1, 3)
            case.body.pop("max_tokens", None)
            case.body["max_completion_tokens"] = min(case.body.get("max_completion_tokens") or 4, 4)
        # Not that all that fits is accepted: a description has no words for what goes together.
        answer = case.call(timeout=60)
        case.validate_response(answer, excluded_checks=[positive_data_acceptance])
        statuses.append(answer.status_code)
        kind = answer.headers["content-type"][0]
        came = httpx.Response(
            answer.status_code, content=answer.content, headers={"content-type": kind}
        )
        if answer.status_code >= 400:
            strict.problem(came)
        elif positive:
            parse = strict.chunks if case.body.get("stream") else strict.completion
            parse(came)

    holds()
    if (method, path) == CHAT:
        served_some = 200 in statuses
        assert served_some == (mode == GenerationMode.POSITIVE), statuses
