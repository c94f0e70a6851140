"""A server with the page, over a tiny model whose answers end when they are stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastapi import FastAPI

from cartridge_distill.model.prompts import render_document
from cartridge_distill.server.app import Service
from cartridge_distill.server.openai.app import create_openai_app
from cartridge_distill.server.playground.page import Place, Playground, Shown, add_playground
from cartridge_distill.server.running import BackgroundServer
from cartridge_distill.server.settings import ServerSettings
from cartridge_distill.util.known_hosts import KnownHosts
from tests.tiny import byte_tokenizer, random_cartridge, tiny_model, write_cartridge

BASE = "org/base"
DOCUMENT = "The harbour master keeps the keys. He sings in the choir on Sundays.\n" * 3
MARKUP = "<img src=x onerror=\"document.title='taken'\">"


@contextmanager
def playground_server(
    folder: Path, texts: tuple[str, ...] = ("Who?",)
) -> Iterator[BackgroundServer]:
    """Cartridges "anna", whose document is known, and "ben".

    Args:
        texts: example questions of anna.
    """
    model, tokenizer = tiny_model(max_position_embeddings=16_384), byte_tokenizer()
    for config in (model.config, model.generation_config):
        config.eos_token_id = None
    tokenizer.eos_token = None
    for seed, name in enumerate(("cartridge0", "cartridge1")):
        write_cartridge(random_cartridge(model, 16, seed), folder, name)
    document = render_document(tokenizer, DOCUMENT)

    def create(service: Service, hosts: KnownHosts) -> FastAPI:
        service.engine.expect(document)
        ids = {"anna": "cartridge0", "ben": "cartridge1"}
        app = create_openai_app(service, ids, hosts, {"anna:document": document})
        anna = Shown(Place("anna", 16), Place("anna:document", len(document)), questions=texts)
        ben = Shown(Place("ben", 16), no_document=f"Not known. {MARKUP}")
        add_playground(app, Playground(BASE, 512, 16_384, [anna, ben]))
        return app

    settings = ServerSettings(folder, model_name=BASE)
    with BackgroundServer(model, tokenizer, settings, threads=1, create=create) as server:
        yield server
