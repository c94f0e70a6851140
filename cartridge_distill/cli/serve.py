"""``cartridge-distill serve``: the embedded engine behind OpenAI's chat API."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import typer

from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.openmp import spinning

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeOptions:
    """As the command line gives them; ``cartridges`` are NAME=SOURCE."""

    model: str
    cartridges: tuple[str, ...]
    host: str
    port: int
    device: str
    dtype: str
    threads: int | None
    seed: int


def named(cartridges: tuple[str, ...], model: str) -> dict[str, str]:
    """Sources by name.

    Raises:
        ConfigError: not NAME=SOURCE, a name that is none, or one that is taken.
    """
    sources: dict[str, str] = {}
    for given in cartridges:
        name, equals, source = given.partition("=")
        if not equals or not source or not _NAME.fullmatch(name):
            raise ConfigError(
                f"--cartridge {given!r}: say NAME=SOURCE, the name of letters, digits and . _ -"
            )
        if name in sources or name == model:
            raise ConfigError(f"--cartridge {given!r}: the name {name!r} is taken")
        sources[name] = source
    return sources


def run(options: ServeOptions) -> None:
    """Until Ctrl-C.

    Raises:
        ConfigError: options that cannot work.
        CartridgeFormatError: a cartridge that cannot be read, or is for another model.
    """
    sources = named(options.cartridges, options.model)
    if options.host not in _LOOPBACK:
        typer.echo(
            f"--host {options.host}: whoever reaches this address can use it; there is no token "
            "here (the gateway has one)",
            err=True,
        )
    os.environ.update(spinning(os.environ))  # before torch is imported
    import torch
    import uvicorn
    from transformers import AutoConfig, AutoTokenizer

    from cartridge_distill.cartridge.checkpoint import read_cartridge, write_cartridge
    from cartridge_distill.model.loading import load_model
    from cartridge_distill.server.app import Service
    from cartridge_distill.server.openai import create_openai_app
    from cartridge_distill.server.settings import ServerSettings

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="cartridges-") as folder:
        config = AutoConfig.from_pretrained(options.model)
        ids = {}
        for number, (name, source) in enumerate(sources.items()):
            # Ids of our own: a name may hold what the server's directory names may not.
            ids[name] = f"cartridge{number}"
            stored = read_cartridge(source, config).for_model(options.model)
            write_cartridge(stored, Path(folder) / ids[name], "tokasaurus")
            typer.echo(f"{name}: {stored.snapshot.num_tokens} tokens, {source}")
        settings = ServerSettings(
            cartridge_dir=Path(folder), model_name=options.model, seed=options.seed
        )
        typer.echo(f"loading {options.model} ...")
        model = load_model(options.model, getattr(torch, options.dtype), options.device)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        service = Service(model, tokenizer, settings, options.threads)
        shown = f"http://{options.host}:{options.port}/v1"
        typer.echo(f"serving {', '.join(sources) or options.model} on {shown} (Ctrl-C ends it)")
        uvicorn.run(
            create_openai_app(service, ids),
            host=options.host,
            port=options.port,
            log_level="warning",
            timeout_graceful_shutdown=3,
        )
