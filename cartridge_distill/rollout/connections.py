"""How a server is reached: TLS, and the proxy that the environment names."""

from __future__ import annotations

import functools
import ssl
import urllib.parse
import urllib.request

import httpx


@functools.cache
def tls() -> ssl.SSLContext:
    """One for all connections: reading the list of authorities takes some 20 ms.

    httpx's, which brings the list along: not every container has one of its own.
    """
    return httpx.create_ssl_context()


def proxy_for(url: str) -> str | None:
    """The proxy that the environment (``HTTPS_PROXY``, ``NO_PROXY``, ...) names for a URL.

    aiohttp would look itself, and take credentials from ``~/.netrc`` as well.
    """
    parts = urllib.parse.urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")
