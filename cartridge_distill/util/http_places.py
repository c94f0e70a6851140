"""A bound on the open connections of a server, which silent clients cannot use up.

A process has some thousand file descriptors. Whoever opens more connections than that ends it for
all, also when he says nothing. So a server has a number of places. When all are taken, the
connection goes from which nothing has come for longest; one of which the request is being answered
never goes. When all are being answered, the newcomer is told to come again.
"""

from __future__ import annotations

import json
import logging
import resource
from typing import Protocol

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 2048
OTHER_FILES = 128
"""Descriptors that a server needs beside its clients'."""
_FEWEST = 16
_WORDS = json.dumps(
    {"detail": "all connections of this server are in use; try again in a second"}
).encode()
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(_WORDS), _WORDS)
)


class Connection(Protocol):
    """What has a place."""

    def give_way(self) -> None:
        """Closes it at once."""


class Places:
    """The places of one server; used by one thread.

    Args:
        limit: of connections.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # In order of their last sign of life.
        self._silent: dict[Connection, None] = {}
        self._served: set[Connection] = set()
        self._told: set[Connection] = set()

    def __len__(self) -> int:
        return len(self._silent) + len(self._served) + len(self._told)

    def enter(self, connection: Connection) -> bool:
        """A new connection; False when there is no place for it."""
        if len(self._silent) + len(self._served) >= self.limit:
            if not self._silent:
                return False
            longest = next(iter(self._silent))
            self.leave(longest)
            longest.give_way()
        self._silent[connection] = None
        return True

    def may_be_told(self, connection: Connection) -> bool:
        """Whether one without a place may stay until it has read why; a few may, at once."""
        if len(self._told) >= max(_FEWEST, self.limit // 8):
            return False
        self._told.add(connection)
        return True

    def heard(self, connection: Connection) -> None:
        """Something came of a request that is not whole yet."""
        if connection in self._silent:
            del self._silent[connection]
            self._silent[connection] = None

    def served(self, connection: Connection) -> None:
        """Its request is whole, and is answered now."""
        if connection in self._silent:
            del self._silent[connection]
            self._served.add(connection)

    def answered(self, connection: Connection) -> None:
        """It waits for its client again."""
        if connection in self._served:
            self._served.remove(connection)
            self._silent[connection] = None

    def leave(self, connection: Connection) -> None:
        """It is closed."""
        self._silent.pop(connection, None)
        self._served.discard(connection)
        self._told.discard(connection)


def possible(asked: int, other_files: int = OTHER_FILES) -> int:
    """As many of the connections asked for as the system allows this process.

    The soft limit of open files is raised as far as that takes, and the hard limit allows.

    Args:
        other_files: descriptors that are needed for other things.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = 2**20
    wanted = min(asked + asked // 8 + other_files, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft == resource.RLIM_INFINITY:
        return asked
    found = min(asked, max(_FEWEST, (soft - other_files) * 8 // 9, soft // 4))
    if found < asked:
        logger.warning(
            "%d connections at once, and not %d: the system allows this process %d open files "
            "(ulimit -n)",
            *(found, asked, soft),
        )
    return found
