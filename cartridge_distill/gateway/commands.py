"""The server process: its command line and its environment."""

from __future__ import annotations

import os
import sys

from cartridge_distill.engines.vllm.launch import (
    PackagePath,
    ServeCommand,
    check_python,
)
from cartridge_distill.engines.vllm.options import Options
from cartridge_distill.gateway.settings import TOKEN_VARIABLE, GatewaySettings
from cartridge_distill.util.http_places import MAX_CONNECTIONS


def server_command(settings: GatewaySettings, port: int) -> list[str]:
    """What is started on the loopback, at ``port``.

    Raises:
        ConfigError: there is no such Python, or an argument that cannot be given.
    """
    if settings.backend == "vllm":
        return _vllm(settings, port)
    if settings.backend == "embedded":
        return [
            *(sys.executable, "-m", "cartridge_distill.server"),
            *("--model", settings.model),
            *("--model-name", settings.base_model),
            *("--cartridge-dir", str(settings.cartridge_dir)),
            *("--host", "127.0.0.1"),
            *("--port", str(port)),
            *("--max-tokens-per-request", str(settings.max_request_tokens)),
            # Never fewer than requests that are passed on.
            *("--max-connections", str(max(MAX_CONNECTIONS, 2 * settings.max_inflight))),
            *settings.server_args,
        ]
    return [
        *(sys.executable, "-m", "cartridge_distill.engines.tokasaurus"),
        *(() if settings.defence == "repair" else ("--unrepaired",)),
        f"model={settings.model}",
        f"port={port}",
        f"cartridge_dir={settings.cartridge_dir}",
        f"kv_cache_num_tokens={settings.kv_cache_tokens}",
        f"max_num_tokens_per_request={settings.max_request_tokens}",
        *settings.server_args,
    ]


def _vllm(settings: GatewaySettings, port: int) -> list[str]:
    options = Options(
        cartridge_dir=settings.cartridge_dir,
        model_name=settings.base_model,
        max_tokens_per_request=settings.max_request_tokens,
    )
    command = ServeCommand(
        model=settings.model,
        options=options,
        host="127.0.0.1",
        port=port,
        max_model_len=settings.max_cartridge_tokens + settings.max_request_tokens,
        more=settings.server_args,
    )
    return command.own(check_python(settings.engine_python))


def server_environment(package: PackagePath | None = None) -> dict[str, str]:
    """This process's environment without tokens, which the server has no use for.

    Args:
        package: where a server in another environment finds this package.
    """
    # vLLM would ask the gateway for the second one, which is for a vLLM of its own.
    secret = {TOKEN_VARIABLE, "VLLM_API_KEY"}
    found = {name: value for name, value in os.environ.items() if name not in secret}
    return found if package is None else package.environment(found)
