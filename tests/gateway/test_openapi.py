"""schemathesis against the gateway's own OpenAPI description: whatever is sent, no crash."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.gateway.rig import TOKEN, Rig

pytestmark = [pytest.mark.integration, pytest.mark.timeout(280)]
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
OPERATIONS = {
    ("GET", "/ping"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/custom/cartridge/completions"),
    ("POST", "/custom/cartridge/chat/completions"),
    ("GET", "/cartridges"),
    ("GET", "/cartridges/{version_id}"),
    ("PUT", "/cartridges/{version_id}"),
    ("DELETE", "/cartridges/{version_id}"),
}


@pytest.fixture(scope="module")
def schema(rig: Rig) -> Any:
    description = httpx.get(rig.url + "/openapi.json", headers=HEADERS).json()
    made = schemathesis.openapi.from_dict(description)
    made.config.update(base_url=rig.url)
    return made


def test_every_operation_is_described_and_tried(schema: Any) -> None:
    described = {
        (method.upper(), path)
        for path, methods in schema.raw_schema["paths"].items()
        for method in methods
    }
    assert described == OPERATIONS


@pytest.mark.parametrize(("method", "path"), sorted(OPERATIONS))
def test_the_gateway_keeps_its_word(schema: Any, rig: Rig, method: str, path: str) -> None:
    """Statuses and bodies that are described, no 5xx, and nothing let in without the token."""

    @given(case=schema[path][method].as_strategy())
    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def holds(case: Any) -> None:
        # Not that what fits the schema is accepted: no schema says that a prompt must fit the
        # model, or what bytes are a cartridge.
        case.call_and_validate(
            headers=HEADERS, timeout=60, excluded_checks=[positive_data_acceptance]
        )

    holds()
    assert "Traceback" not in rig.log
