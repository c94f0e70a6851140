"""``cartridge-distill serve --engine vllm``: the line for a stock vLLM, or a vLLM started with it.

Without ``--engine-python`` the command prints what to run where vLLM is installed. With it, vLLM is
started in its own environment: behind OpenAI's chat API for named cartridges, behind the gateway
for training.
"""

from __future__ import annotations

import os
import signal
import subprocess

from cartridge_distill.cli.program import echo
from cartridge_distill.cli.serve import (
    CHAT_PORT,
    ServeOptions,
    chat_request,
    run_rollout_server,
    to_serve,
)
from cartridge_distill.engines.vllm.launch import (
    PackagePath,
    ServeCommand,
    check_python,
)
from cartridge_distill.engines.vllm.offline import place_of
from cartridge_distill.engines.vllm.options import Options
from cartridge_distill.util.clean_logs import hide_secrets_in_logs
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.listening import listening_socket
from cartridge_distill.util.next_command import say_next


def serve_vllm(options: ServeOptions, engine_python: str | None, more: list[str]) -> int:
    """Serves with vLLM, or says how.

    Args:
        engine_python: the Python of vLLM's environment; None prints the line for it.
        more: further arguments, of vLLM where cartridges are named, else of the gateway.

    Returns:
        The exit status.

    Raises:
        ConfigError: options that cannot work.
        CartridgeFormatError: a cartridge that cannot be read, or is for another model.
    """
    if options.device != "cpu" or options.threads is not None:
        raise ConfigError(
            "--device and --threads are the embedded server's; fix: leave them out, vLLM takes the "
            "device that it was built for, and threads from OMP_NUM_THREADS"
        )
    if options.documents:
        raise ConfigError(
            "--document is the embedded server's, for its page; fix: leave it out, vLLM takes the "
            "document in the conversation"
        )
    if options.cartridges or options.run is not None:
        return _serve_named(options, engine_python, tuple(more))
    engine = ["--backend", "vllm", "--engine-python", check_python(engine_python)]
    return run_rollout_server(options, more, engine)


def _serve_named(options: ServeOptions, engine_python: str | None, more: tuple[str, ...]) -> int:
    from cartridge_distill.cartridge.checkpoint import read_cartridge
    from cartridge_distill.model.identity import check_same_weights
    from cartridge_distill.model.reading import read_model_config

    hide_secrets_in_logs()
    _, sources, model = to_serve(options)
    config = read_model_config(model)
    places = {name: place_of(source) for name, source in sources.items()}
    for name, place in places.items():
        stored = read_cartridge(place, config)
        allow = options.allow_other_model
        if told := check_same_weights(stored.meta, place, model, allow_other=allow):
            echo(f"warning: {told}", err=True)
        echo(f"{name}: {stored.snapshot.num_tokens} tokens, {place}", err=True)
    port = CHAT_PORT if options.port is None else options.port
    if engine_python is not None:
        with listening_socket(options.host, port) as free:
            port = free.getsockname()[1]  # vLLM takes it, a minute later
    command = ServeCommand(
        model=model,
        options=Options(
            cartridges=places,
            model_name=model,
            seed=options.seed,
            allow_hosts=options.allow_host,
        ),
        host=options.host,
        port=port,
        dtype=options.dtype,
        more=more,
    )
    if engine_python is None:
        echo(
            "# where vLLM and this package are installed together (or say --engine-python, and it "
            "is started here):",
            err=True,
        )
        echo(command.stock())
        return 0
    say_next(chat_request(f"http://{options.host}:{port}/v1", next(iter(places))))
    return _run(command.own(check_python(engine_python)))


def _run(command: list[str]) -> int:
    """Runs vLLM until it ends, or until this process is told to: it would outlive its parent."""
    package = PackagePath()
    ending = False

    def end(*_: object) -> None:
        nonlocal ending
        (child.kill if ending else child.terminate)()
        ending = True

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    try:
        # A session of its own: the terminal's Ctrl-C would reach it beside what is sent here, and
        # of two signals vLLM's server does not finish its requests.
        child = subprocess.Popen(
            command, env=package.environment(dict(os.environ)), start_new_session=True
        )
        before = {number: signal.signal(number, end) for number in numbers}
        try:
            status = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    finally:
        package.remove()
    return 0 if ending else status
