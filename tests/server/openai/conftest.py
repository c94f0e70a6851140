"""A served tiny model with two cartridges, and OpenAI's own client."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import openai
import pytest
from fastapi import FastAPI
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cartridge_distill.server.app import Service
from cartridge_distill.server.openai.app import create_openai_app
from cartridge_distill.server.running import BackgroundServer
from cartridge_distill.server.settings import ServerSettings
from cartridge_distill.util.known_hosts import KnownHosts
from tests.tiny import random_cartridge, write_cartridge

BASE = "org/base"
CARTRIDGES = {"anna": "cartridge0", "ben.v2": "cartridge1"}


@pytest.fixture(scope="session")
def served(
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[BackgroundServer]:
    folder = tmp_path_factory.mktemp("openai")
    for seed, name in enumerate(CARTRIDGES.values()):
        write_cartridge(random_cartridge(llama, 16, seed), folder, name)
    settings = ServerSettings(folder, model_name=BASE)

    def create(service: Service, hosts: KnownHosts) -> FastAPI:
        return create_openai_app(service, CARTRIDGES, hosts)

    with BackgroundServer(copy.deepcopy(llama), tokenizer, settings, create=create) as server:
        yield server


@pytest.fixture(scope="session")
def client(served: BackgroundServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made
