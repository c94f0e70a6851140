"""A server that many tests only ask for what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cartridge_distill.server.running import BackgroundServer
from cartridge_distill.server.settings import ServerSettings


@pytest.fixture(scope="module")
def refusing_server(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: Any
) -> Any:
    settings = ServerSettings(tmp_path_factory.mktemp("none"), max_tokens_per_request=64)
    with BackgroundServer(copy.deepcopy(llama), tokenizer, settings) as server:
        yield server
