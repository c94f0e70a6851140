"""Command line of the gateway: ``python -m cartridge_distill.gateway --help``."""

from __future__ import annotations

import argparse
import gc
import logging
import signal
import socket
import sys
from typing import Any, get_args

import uvicorn
from pydantic import ValidationError

from cartridge_distill.gateway.settings import (
    TOKEN_VARIABLE,
    GatewaySettings,
    token_from_environment,
)
from cartridge_distill.util.clean_logs import hide_secrets_in_logs
from cartridge_distill.util.command_line import Parser
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.http_connections import uvicorn_options
from cartridge_distill.util.known_hosts import LOOPBACK, KnownHosts
from cartridge_distill.util.server_url import DEFAULT_PORT
from cartridge_distill.util.standard_output import guard_output

DESCRIPTION = """\
Serve a model with cartridges to trainers that are elsewhere: start the server on the loopback,
take new cartridge versions over HTTP, pass completions through, let nobody in without the token.
"""
EXAMPLES = f"""\
examples:
  # a token for both ends
  export {TOKEN_VARIABLE}=$(python -c 'import secrets; print(secrets.token_urlsafe(32))')

  # the real Tokasaurus, on a GPU box
  python -m cartridge_distill.gateway --backend tokasaurus \\
      --model meta-llama/Llama-3.2-3B-Instruct --cartridge-dir /data/cartridges --host 0.0.0.0

  # an unmodified vLLM, in its own environment
  python -m cartridge_distill.gateway --backend vllm --engine-python ~/vllm-env/bin/python \\
      --model meta-llama/Llama-3.2-3B-Instruct --cartridge-dir /data/cartridges --host 0.0.0.0

  # this project's own server, on a CPU; what stands after -- goes to the server
  python -m cartridge_distill.gateway --model path/to/model -- --threads 2

  # from the trainer's machine
  curl https://gpu-box:10210/ping
  curl -H "Authorization: Bearer ${TOKEN_VARIABLE}" https://gpu-box:10210/cartridges
  curl -H "Authorization: Bearer ${TOKEN_VARIABLE}" https://gpu-box:10210/metrics

good to know:
  * /ping answers 503 until the server process has loaded its model, and needs no token.
  * The token travels in clear over http://. Across networks put TLS in front (Modal does).
  * A version's id stands for one content for ever. New weights need a new id.
  * Ctrl-C or SIGTERM: what is in flight is finished first, within --drain-s.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m cartridge_distill.gateway",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, field in GatewaySettings.model_fields.items():
        if name == "server_args":
            continue
        flag = "--" + name.replace("_", "-")
        words = " ".join((field.description or "").split()).replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=words)
            continue
        if field.default not in (None, ...) and not field.is_required():
            words += f" (default: {field.default})"
        options: dict[str, Any] = {"help": words, "default": argparse.SUPPRESS}
        choices = get_args(field.annotation)
        if choices and all(isinstance(choice, str) for choice in choices):
            options["choices"] = choices
        else:
            options["metavar"] = name.rsplit("_", 1)[-1].upper()
        parser.add_argument(flag, required=field.is_required(), **options)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name of this gateway, as clients write it; others are refused. Repeatable; "
        "* allows every name (default: the loopback; every name where --host is another address, "
        "for the token is needed there)",
    )
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="(default: %(default)s)")
    parser.add_argument(
        "--no-token", action="store_true", help="let everybody in; on the loopback only"
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning"])
    parser.add_argument(
        "server_args", nargs="*", metavar="-- ARGUMENT", help="arguments of the server process"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs until told to stop; returns the exit code."""
    given = vars(parse(sys.argv[1:] if arguments is None else arguments))
    host, port = given.pop("host"), given.pop("port")
    allowed = given.pop("allow_host")
    no_token, level = given.pop("no_token"), given.pop("log_level")
    hide_secrets_in_logs()
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    failed: list[str] = []
    try:
        settings = GatewaySettings(**given)
        if no_token and not _is_loopback(host):
            raise ConfigError(
                f"--no-token with --host {host}: whoever reaches this address could use the "
                "server and change its cartridges; fix: listen on 127.0.0.1, or set a token"
            )
        token = None if no_token else token_from_environment()
        checked = no_token or allowed or _is_loopback(host)
        hosts = KnownHosts(host, allowed) if checked else None
        listener = _listen(host, port)

        # After what can be refused at once: this import takes seconds.
        from cartridge_distill.gateway.app import create_app, end_this_process

        def fatal(reason: str) -> None:
            failed.append(reason)
            end_this_process(reason)

        app = create_app(settings, token, fatal, hosts)
    except ValidationError as error:
        for problem in error.errors():
            name = "-".join(str(part) for part in problem["loc"]).replace("_", "-")
            print(f"cannot start: --{name}: {problem['msg']}", file=sys.stderr)
        return 2
    except (ConfigError, OSError) as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return 2
    config = uvicorn.Config(
        app,
        log_level="warning" if level == "info" else level,
        access_log=False,  # hundreds of rollouts per step; /metrics counts them
        timeout_graceful_shutdown=round(settings.drain_s),
        **uvicorn_options(settings.idle_s, settings.max_connections, settings.other_files),
    )
    print(
        f"gateway on http://{host}:{listener.getsockname()[1]}"
        f"{' WITHOUT A TOKEN' if no_token else ''}; {settings.backend} server of {settings.model}; "
        f"cartridges in {settings.cartridge_dir}",
        flush=True,
    )

    def stop_early(*_: object) -> None:
        raise KeyboardInterrupt

    # Until uvicorn takes the signals over, and when it hands them on, having shut down in order.
    signal.signal(signal.SIGTERM, stop_early)
    signal.signal(signal.SIGINT, stop_early)
    # What the imports made stays for ever: the collector need not walk over it again and again.
    gc.collect()
    gc.freeze()
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    print("stopped", flush=True)
    return 1 if failed else 0


def _is_loopback(host: str) -> bool:
    return host in LOOPBACK


def _listen(host: str, port: int) -> socket.socket:
    """Takes the port before anything slow; connections are refused until the app is there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's algorithm off; uvicorn's two writes per answer
    # would otherwise wait 40 ms for the client's acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise OSError(f"{host}:{port}: {error.strerror}; choose another --port") from error
    return listener


if __name__ == "__main__":
    guard_output()
    sys.exit(main())
