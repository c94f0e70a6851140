"""``cartridge-distill serve``: the embedded engine, behind OpenAI's chat API or for training.

For training it is the gateway's own command with the embedded server; without a token on the
loopback where none is set, so that `serve` and `train` need no environment on one machine.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

import typer

from cartridge_distill.util.clean_logs import hide_secrets_in_logs
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.known_hosts import LOOPBACK, KnownHosts
from cartridge_distill.util.next_command import next_command, say_next
from cartridge_distill.util.openmp import spinning

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
CHAT_PORT, ROLLOUT_PORT = 8000, 10210
_DTYPE = "float32"  # of the embedded server


@dataclass(frozen=True)
class ServeOptions:
    """As the command line gives them; ``cartridges`` are NAME=SOURCE, ``allow_host`` further names
    of the server; ``dtype`` is None where none was asked for."""

    model: str
    cartridges: tuple[str, ...]
    host: str
    port: int | None
    device: str
    dtype: str | None
    threads: int | None
    seed: int
    allow_host: tuple[str, ...] = ()


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
    hosts = KnownHosts(options.host, options.allow_host)
    if options.host not in LOOPBACK:
        typer.echo(
            f"--host {options.host}: whoever reaches this address can use it; there is no token "
            "here (the gateway has one)",
            err=True,
        )
    hide_secrets_in_logs()
    os.environ.update(spinning(os.environ))  # before torch is imported
    import torch
    import uvicorn

    from cartridge_distill.cartridge.checkpoint import read_cartridge, write_cartridge
    from cartridge_distill.model.loading import load_model
    from cartridge_distill.model.reading import read_model_config, read_tokenizer
    from cartridge_distill.server.app import Service
    from cartridge_distill.server.openai.app import create_openai_app
    from cartridge_distill.server.settings import ServerSettings
    from cartridge_distill.util.http_connections import uvicorn_options

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="cartridges-") as folder:
        config = read_model_config(options.model)
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
        model = load_model(options.model, getattr(torch, options.dtype or _DTYPE), options.device)
        tokenizer = read_tokenizer(options.model)
        service = Service(model, tokenizer, settings, options.threads)
        port = CHAT_PORT if options.port is None else options.port
        shown = f"http://{options.host}:{port}/v1"
        typer.echo(f"serving {', '.join(sources) or options.model} on {shown} (Ctrl-C ends it)")
        say_next(chat_request(shown, next(iter(sources), options.model)))
        uvicorn.run(
            create_openai_app(service, ids, hosts),
            host=options.host,
            port=port,
            log_level="warning",
            timeout_graceful_shutdown=3,
            **uvicorn_options(settings.idle_s),
        )


def chat_request(base: str, name: str) -> str:
    """A request to the chat API, ready to paste."""
    body = {"model": name, "messages": [{"role": "user", "content": "What do you know?"}]}
    kind = "-H 'Content-Type: application/json'"
    return f"curl {base}/chat/completions {kind} -d {shlex.quote(json.dumps(body))}"


def run_rollout_server(
    options: ServeOptions, more: list[str], engine: list[str] | None = None
) -> int:
    """The gateway with the embedded server or vLLM, until Ctrl-C.

    Args:
        more: further arguments of the gateway.
        engine: the gateway's arguments for another engine than the embedded server.

    Returns:
        Its exit status.
    """
    from cartridge_distill.gateway.__main__ import main
    from cartridge_distill.gateway.settings import TOKEN_VARIABLE

    port = ROLLOUT_PORT if options.port is None else options.port
    arguments = ["--model", options.model, "--host", options.host, "--port", str(port), *more]
    for name in options.allow_host:
        arguments += ["--allow-host", name]
    if options.host in LOOPBACK and not os.environ.get(TOKEN_VARIABLE):
        typer.echo(f"{TOKEN_VARIABLE} is not set: everybody on this machine may use the server")
        arguments.append("--no-token")
    server = ["--seed", str(options.seed)]
    if engine is None:
        server += ["--device", options.device, "--dtype", options.dtype or _DTYPE]
    elif options.dtype is not None:
        server += ["--dtype", options.dtype]
    if options.threads is not None:
        server += ["--threads", str(options.threads)]
    where = [] if options.device.startswith("cuda") else ["--device", "cpu"]
    url = f"http://{options.host}:{port}"
    train = ["--model", options.model, "--data", "DATA", "--server", url, *where]
    say_next(next_command("train", *train) + "    # DATA: the folder that prepare wrote")
    return main([*arguments, *(engine or ()), "--", *server])
