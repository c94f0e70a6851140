"""Only requests that name this server: against pages that make a browser ask in their stead.

A page can have its own name point to 127.0.0.1 (DNS rebinding), and the browser then lets it read
what a server without a token says. The browser still sends the page's name as ``Host``, and the
page's origin as ``Origin``; so both must be names of this server. Known are:

- the loopback: ``localhost``, ``127.0.0.1``, ``::1``;
- the address it was told to listen on;
- where that is every address (``0.0.0.0``, ``::``): this machine's name, and every ``Host`` that is
  an address in numbers, which no name can be made to point to;
- what was allowed besides (``--allow-host``); ``*`` allows every name.

An ``Origin`` may also be the very ``Host`` that was asked, which is the same page's server.
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cartridge_distill.util.errors import ConfigError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_EVERY_ADDRESS = ("0.0.0.0", "::", "")
_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::(\d{1,5}))?", re.IGNORECASE)


class KnownHosts:
    """The names of one server.

    Args:
        host: the address it listens on.
        more: further names, as clients write them, without a port; ``*`` for every name.

    Raises:
        ConfigError: a name that is none.
    """

    def __init__(self, host: str = "127.0.0.1", more: Sequence[str] = ()) -> None:
        for name in more:
            if name != "*" and (_name_of(name) is None or _with_port(name)):
                raise ConfigError(
                    f"--allow-host {name!r} names no host; fix: give a host's name or address, "
                    "without http:// and without a port, or * for every name"
                )
        self._every_name = "*" in more
        self._every_address = host in _EVERY_ADDRESS
        names = [*LOOPBACK, host, *more]
        if self._every_address:
            names += [socket.gethostname(), socket.getfqdn()]
        self._names = {found for name in names if (found := _name_of(name)) is not None}

    def problem(self, hosts: Sequence[str], origins: Sequence[str]) -> str | None:
        """Why a request is not answered; None for one that is.

        Args:
            hosts, origins: the values of all its headers of these names.
        """
        if self._every_name:
            return None
        fix = "start the server with --allow-host NAME if NAME is one of its own"
        if len(hosts) != 1:
            return f"{len(hosts)} Host headers; send one"
        host = _name_of(hosts[0])
        if host is None:
            return f"the Host header {hosts[0]!r:.80} names no host"
        by_number = self._every_address and _is_address(host)
        if not (by_number or host in self._names):
            return f"this server is not known as {hosts[0]!r:.80}; {fix}"
        for origin in origins:
            scheme, _, rest = origin.partition("://")
            asked_by = _name_of(rest) if scheme in ("http", "https") else None
            if asked_by not in self._names and rest.lower() != hosts[0].lower():
                return f"pages of {origin!r:.80} may not ask this server; {fix}"
        return None


class OnlyKnownHosts:
    """A plain ASGI layer that answers everything else with HTTP 403, before its body is read."""

    def __init__(self, app: ASGIApp, hosts: KnownHosts) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        named: dict[bytes, list[str]] = {b"host": [], b"origin": []}
        for name, value in scope["headers"]:
            if name.lower() in named:
                named[name.lower()].append(value.decode("latin-1"))
        problem = self._hosts.problem(named[b"host"], named[b"origin"])
        if problem is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await _refuse(send, problem)
        else:
            await send({"type": "websocket.close", "code": 1008})


async def _refuse(send: Send, problem: str) -> None:
    # In the words of both: this project's servers, and OpenAI's API.
    error = {"message": problem, "type": "invalid_request_error", "param": None, "code": 403}
    body = json.dumps({"detail": problem, "error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # the body was not read
    ]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _name_of(authority: str) -> str | None:
    """The host of ``host:port`` in one spelling; None where it is none."""
    bare = authority.strip()
    if ":" in bare and _is_address(bare):  # ::1, as --host has it
        return str(ipaddress.ip_address(bare))
    found = _AUTHORITY.fullmatch(bare)
    if found is None:
        return None
    name = (found[1] or found[2]).lower().rstrip(".")
    if found[1] is not None and not _is_address(name):
        return None
    return (str(ipaddress.ip_address(name)) if _is_address(name) else name) or None


def _with_port(authority: str) -> bool:
    found = None if _is_address(authority) else _AUTHORITY.fullmatch(authority)
    return found is not None and found[3] is not None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
