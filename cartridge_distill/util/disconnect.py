"""Work for an HTTP request that ends when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

T = TypeVar("T")

CLIENT_WENT_AWAY = 499
"""nginx's status of a request whose client left before its answer: for logs, nobody reads it."""


async def unless_disconnected(http: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Awaits ``work``; cancels it and returns None when the client goes away first.

    The request's body must have been read.
    """

    async def gone() -> None:
        # The body has been read: the next message but one can only be the disconnect.
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
