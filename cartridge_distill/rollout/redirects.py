"""Which redirects a client with credentials follows: those that stay with the server it asked.

A server that answers "look elsewhere" would otherwise be handed the credentials of whoever asks,
and with 307 and 308 the prompts or the weights as well. So:

==============  ============================================================================
another origin  refused, whatever the status: another host, port or scheme
303             followed with GET and without the body; Modal answers so when a request takes
                long, and the result is fetched from there
307, 308        followed with the same method and body
301, 302        followed for GET; refused for what has a body, which some clients drop
==============  ============================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

from yarl import URL

from cartridge_distill.util.errors import RolloutError

MAX_REDIRECTS = 50
_STATUSES = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True)
class Target:
    """What is asked for next.

    Attributes:
        is_encoded: the address is the server's own, and is sent as it is.
    """

    method: str
    url: str
    with_body: bool
    is_encoded: bool = False


def next_target(asked: Target, status: int, location: str | None) -> Target | None:
    """Where an answer leads; None for an answer that is no redirect.

    Args:
        location: the header; without it a redirect is an answer like any other.

    Raises:
        RolloutError: it leads to another origin, or cannot be followed.
    """
    if status not in _STATUSES or location is None:
        return None
    here = URL(asked.url, encoded=asked.is_encoded)
    said = f"{asked.method} {here.with_query(None)} was answered with a redirect (HTTP {status})"
    try:
        there = here.join(URL(location, encoded=True)).with_fragment(None)
        origin = there.origin()
    except ValueError as error:
        raise RolloutError(
            f"{said} to an address that is none; fix: give the server's own URL"
        ) from error
    if origin != here.origin():
        raise RolloutError(
            f"{said} to {origin}, which is another host, port or scheme than {here.origin()}: it "
            "is not followed, for the credentials and the prompts would go there; fix: if that is "
            "the server, give its own URL"
        )
    if there.user is not None or there.password is not None:
        raise RolloutError(
            f"{said} to an address with a user in it, which is not followed; fix: give the "
            "server's own URL"
        )
    if status == 303:
        return Target("GET", str(there), with_body=False, is_encoded=True)
    if asked.with_body and status in (301, 302):
        raise RolloutError(
            f"{said}, which does not say whether the body goes along; it is not followed; fix: "
            "give the URL that the server redirects to"
        )
    return Target(asked.method, str(there), asked.with_body, is_encoded=True)
