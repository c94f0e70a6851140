"""Engines over copies of a model, and a server that many tests only ask for what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cartridge_distill.server.engine import Engine
from cartridge_distill.server.running import BackgroundServer
from cartridge_distill.server.settings import ServerSettings

EngineOf = Callable[..., Engine]


@pytest.fixture
def engine_of() -> Iterator[EngineOf]:
    """A function that starts an engine over a copy of a model; all are stopped at the end."""
    running: list[Engine] = []

    def start(model: PreTrainedModel, **settings: int) -> Engine:
        engine = Engine(copy.deepcopy(model), ServerSettings(**settings))  # type: ignore[arg-type]
        engine.start()
        running.append(engine)
        return engine

    yield start
    for engine in running:
        engine.stop()


@pytest.fixture(scope="module")
def refusing_server(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: Any
) -> Any:
    settings = ServerSettings(tmp_path_factory.mktemp("none"), max_tokens_per_request=64)
    with BackgroundServer(copy.deepcopy(llama), tokenizer, settings) as server:
        yield server
