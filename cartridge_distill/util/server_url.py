"""The address of a server, as it may be written anywhere: without a credential."""

from __future__ import annotations

import urllib.parse

from cartridge_distill.util.errors import ConfigError

DEFAULT_PORT = 10210
"""Of a rollout server, where nobody says otherwise."""


def checked_url(url: str) -> str:
    """A server's base URL, without the slash at its end.

    A user or a password in it would stand in every list of processes, in veRL's log and in Ray's;
    a query would end up in the middle of each request's address.

    Raises:
        ConfigError: it is no ``http://`` or ``https://`` URL of a host, or it holds more than one.
            The message never repeats a credential.
    """
    bare = url.strip().rstrip("/")
    if not bare.startswith(("http://", "https://")):
        shown = _after_user(bare) if "@" in bare else bare
        raise ConfigError(
            f"server URL {shown!r} is no address; fix: begin it with http:// or https://"
        )
    # Before anything is read or shown of it: a password may hold whatever ends a host.
    if "@" in bare:
        raise ConfigError(
            f"the server URL to {_after_user(bare)!r} holds a user or a password, which would be "
            "shown wherever the URL is; fix: leave them out, the gateway's token goes into "
            "TOKASAURUS_API_KEY, Modal's pair into MODAL_PROXY_KEY and MODAL_PROXY_SECRET"
        )
    try:
        parts = urllib.parse.urlsplit(bare)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(
            f"server URL {url!r} cannot be read: {error}; fix: write http://host:port"
        ) from None
    if parts.query or parts.fragment or bare.endswith(("?", "#")):
        shown = f"{parts.scheme}://{parts.netloc}{parts.path}"
        raise ConfigError(
            f"the server URL {shown!r} has a query or a fragment behind it; fix: give the "
            "address alone"
        )
    if parts.path.endswith("/v1"):
        raise ConfigError(
            f"the server URL {bare!r} ends in /v1, which is put behind it here; fix: leave it out: "
            f"{bare.removesuffix('/v1')}"
        )
    if not host or any(character.isspace() for character in bare):
        raise ConfigError(f"server URL {bare!r} names no host; fix: write http://host:port")
    return bare


def _after_user(url: str) -> str:
    """The host of a URL that holds a user: what stands after the last ``@``."""
    host = url.rpartition("@")[2]
    for end in "/?#":
        host = host.partition(end)[0]
    return host
