"""``cartridge-distill serve``: the embedded engine, behind OpenAI's chat API or for training.

For training it is the gateway's own command with the embedded server; without a token on the
loopback where none is set, so that `serve` and `train` need no environment on one machine.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cartridge_distill.cartridge.run_folder import CARTRIDGE_FOLDER
from cartridge_distill.cli.about import Asked, check, check_loaded, look
from cartridge_distill.cli.program import echo
from cartridge_distill.cli.shown import Shown
from cartridge_distill.util.clean_logs import hide_secrets_in_logs
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.known_hosts import LOOPBACK, KnownHosts
from cartridge_distill.util.listening import listening_socket, shown_url
from cartridge_distill.util.next_command import next_command, say_next
from cartridge_distill.util.openmp import spinning

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
CHAT_PORT, ROLLOUT_PORT = 8000, 10210
_DTYPE = "float32"  # of the embedded server


@dataclass(frozen=True)
class ServeOptions:
    """As the command line gives them; ``cartridges`` are NAME=SOURCE, ``documents`` NAME=FILE,
    ``allow_host`` further names of the server; ``run`` is a run's folder, or a cartridge; ``dtype``
    is None where none was asked for."""

    model: str | None
    cartridges: tuple[str, ...]
    host: str
    port: int | None
    device: str
    dtype: str | None
    threads: int | None
    seed: int
    allow_host: tuple[str, ...] = ()
    run: str | None = None
    documents: tuple[str, ...] = ()
    allow_other_model: bool = False


def named(
    cartridges: tuple[str, ...], model: str | None, option: str = "--cartridge"
) -> dict[str, str]:
    """Sources by name.

    Raises:
        ConfigError: not NAME=SOURCE, a name that is none, or one that is taken.
    """
    sources: dict[str, str] = {}
    for given in cartridges:
        name, equals, source = given.partition("=")
        if not equals or not source or not _NAME.fullmatch(name):
            raise ConfigError(
                f"{option} {given!r} has no name; fix: say NAME=SOURCE, the name of letters, "
                "digits and . _ -"
            )
        if name in sources or name == model:
            raise ConfigError(
                f"{option} {given!r}: the name {name!r} is taken; fix: give it another"
            )
        sources[name] = source
    return sources


def to_serve(options: ServeOptions) -> tuple[dict[str, Asked], dict[str, str], str]:
    """What is served: what is asked for and where it lies, by name; and the model of all of it.

    Everything that can be known before torch is imported is looked at here.

    Raises:
        ConfigError: options that cannot work, or a model that is not there.
        CartridgeFormatError: a cartridge that is not there.
    """
    given = options.cartridges
    if options.run is not None:
        given = (f"{_name_of(options.run)}={options.run}", *given)
    sources = named(given, options.model)
    documents = named(options.documents, None, "--document")
    if strange := sorted(documents.keys() - sources.keys()):
        raise ConfigError(
            f"--document {strange[0]}=...: there is no cartridge of this name; fix: name one of "
            f"{', '.join(sources)}"
        )
    asked = {
        name: Asked(
            source,
            options.model,
            Path(documents[name]) if name in documents else None,
            options.allow_other_model,
        )
        for name, source in sources.items()
    }
    found = {name: check(one) for name, one in asked.items()}
    models = {name: model for name, (_, model) in found.items()}
    if len(set(models.values())) > 1:
        said = ", ".join(f"{name}: {model}" for name, model in models.items())
        raise ConfigError(
            f"the cartridges name several models ({said}), and a server has one; fix: name it "
            "with --model"
        )
    return asked, {name: str(source) for name, (source, _) in found.items()}, models.popitem()[1]


def _name_of(run: str) -> str:
    """A run's folder as a model's name; of a cartridge in one, the run's."""
    path = Path(run).expanduser().absolute()
    last = path.parent.name if path.name == CARTRIDGE_FOLDER else path.name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")[:128]
    return name or "cartridge"


def run(options: ServeOptions) -> None:
    """Until Ctrl-C.

    Raises:
        ConfigError: options that cannot work.
        CartridgeFormatError: a cartridge that cannot be read, or is for another model.
    """
    asked, sources, model_name = to_serve(options)
    hosts = KnownHosts(options.host, options.allow_host)
    port = CHAT_PORT if options.port is None else options.port
    listener = listening_socket(options.host, port)
    if options.host not in LOOPBACK:
        echo(
            f"--host {options.host}: whoever reaches this address can use it; there is no token "
            "here (the gateway has one)",
            err=True,
        )
    hide_secrets_in_logs()
    os.environ.update(spinning(os.environ))  # before torch is imported
    with listener, tempfile.TemporaryDirectory(prefix="cartridges-") as folder:
        _serve(options, asked, sources, model_name, hosts, listener, Path(folder))


def _serve(
    options: ServeOptions,
    asked: dict[str, Asked],
    sources: dict[str, str],
    model_name: str,
    hosts: KnownHosts,
    listener: socket.socket,
    folder: Path,
) -> None:
    import torch

    from cartridge_distill.util.devices import check_device

    device = check_device(options.device)
    if device.type == "cpu" and torch.cuda.is_available():
        echo("a GPU is here and is not used; --device cuda uses it", err=True)
    import uvicorn

    from cartridge_distill.cartridge.checkpoint import write_cartridge
    from cartridge_distill.model.loading import load_model
    from cartridge_distill.model.reading import read_tokenizer
    from cartridge_distill.server.app import Service
    from cartridge_distill.server.openai.app import create_openai_app
    from cartridge_distill.server.playground.page import add_playground
    from cartridge_distill.server.settings import ServerSettings
    from cartridge_distill.util.http_connections import uvicorn_options

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    abouts, ids = {}, {}
    for number, (name, one) in enumerate(asked.items()):
        about = look(one, sources[name], model_name)
        for warning in about.warnings:
            echo(f"warning: {warning}", err=True)
        assert about.stored is not None
        # Ids of our own: a name may hold what the server's directory names may not.
        ids[name] = f"cartridge{number}"
        stored = about.stored.for_model(model_name)
        write_cartridge(stored, folder / ids[name], "tokasaurus")
        echo(f"{name}: {stored.snapshot.num_tokens} tokens, {one.source}")
        abouts[name] = about
    tokenizer = read_tokenizer(model_name)
    shown = Shown(abouts, tokenizer, model_name)
    settings = ServerSettings(
        cartridge_dir=folder,
        model_name=model_name,
        seed=options.seed,
        # Room for the longest document at least: it is computed once.
        prefix_cache_tokens=max(ServerSettings.prefix_cache_tokens, shown.longest),
    )
    echo(f"loading {model_name} ...")
    model = load_model(model_name, getattr(torch, options.dtype or _DTYPE), device)
    for about in abouts.values():
        check_loaded(about)
    service = Service(model, tokenizer, settings, options.threads)
    playground = shown.on_page(service.limits.max_tokens_per_request, model)
    for name, document in shown.documents.items():
        begun = time.monotonic()
        service.engine.expect(document)
        echo(f"{name}: read, {len(document)} tokens, {time.monotonic() - begun:.1f} s")
    app = create_openai_app(service, ids, hosts, shown.documents)
    add_playground(app, playground)
    url = shown_url(options.host, listener)
    echo(f"serving {', '.join([*sources, *shown.documents])} on {url}/v1 (Ctrl-C ends it)")
    echo(f"playground: {url}/")
    say_next(chat_request(f"{url}/v1", next(iter(sources))))
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=3,
        **uvicorn_options(settings.idle_s, settings.max_connections),
    )
    uvicorn.Server(config).run(sockets=[listener])


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
    from cartridge_distill.model.reading import check_model_place

    if options.model is None:
        raise ConfigError(
            "nothing says what to serve; fix: name a run or a cartridge, or a --model to train "
            "against"
        )
    check_model_place(options.model)
    port = ROLLOUT_PORT if options.port is None else options.port
    with listening_socket(options.host, port) as free:
        port = free.getsockname()[1]  # the gateway takes it, seconds later
    arguments = ["--model", options.model, "--host", options.host, "--port", str(port), *more]
    for name in options.allow_host:
        arguments += ["--allow-host", name]
    if options.host in LOOPBACK and not os.environ.get(TOKEN_VARIABLE):
        echo(f"{TOKEN_VARIABLE} is not set: everybody on this machine may use the server")
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
