"""A port taken before anything is loaded: nobody should learn after minutes that it is not free."""

from __future__ import annotations

import socket

from cartridge_distill.util.errors import ConfigError


def listening_socket(host: str, port: int) -> socket.socket:
    """A bound socket, on which nobody listens yet: connections are refused until a server does.

    Args:
        port: 0 takes a free one; ``getsockname()`` says which.

    Raises:
        ConfigError: the port is taken, or the address is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's algorithm off; uvicorn's two writes per answer
    # would otherwise wait 40 ms for the client's acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        said = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"{host}:{port}: {said}; fix: choose another --port (0 takes a free one), or --host"
        ) from None
    return listener


def shown_url(host: str, listener: socket.socket) -> str:
    """``http://host:port`` of a bound socket, as a client of this machine types it."""
    name = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}.get(host, host)
    if ":" in name and not name.startswith("["):
        name = f"[{name}]"
    return f"http://{name}:{listener.getsockname()[1]}"
