"""A scripted server for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.rollout.scripted import Script, ScriptedHandler
from tests.two_servers import listening


@pytest.fixture
def script() -> Iterator[Script]:
    made = Script()
    handler = type("Handler", (ScriptedHandler,), {"script": made})
    with listening(handler) as made.url:
        yield made
        made.over.set()
