"""The second defence: the server is started again before its block allocator runs out.

The real server, unrepaired, never gives a cartridge's pages back. So the pages that its life has
used are counted, and before the one too many it is drained and restarted: between two steps of a
training run, when a new version arrives, and without a failed request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from cartridge_distill.cartridge.kv_shape import PAGE_TOKENS
from cartridge_distill.gateway.process import ServerProcess


class PageBudget:
    """Counts pages of one server process.

    Args:
        process: restarted when the budget does not suffice.
        pages: that cartridges may take in one life; None counts nothing.
    """

    def __init__(self, process: ServerProcess, pages: int | None) -> None:
        self._process = process
        self._pages = pages
        self._life = 0
        self._loaded: dict[str, int] = {}
        self._lock = asyncio.Lock()

    @property
    def used(self) -> int:
        """Pages used in this life."""
        return sum(self._loaded.values())

    async def admit(self, tokens: Mapping[str, int]) -> None:
        """Before a request with these cartridges: is there room for those not loaded yet?

        Args:
            tokens: number of tokens by cartridge id.

        Raises:
            ServerDown: the restarted process did not come up.
        """
        if self._pages is None:
            return
        async with self._lock:
            self._forget_earlier_lives()
            new = {
                name: -(-count // PAGE_TOKENS)
                for name, count in tokens.items()
                if name not in self._loaded
            }
            if new and self._loaded and self.used + sum(new.values()) > self._pages:
                await self._process.restart("pages")
                self._forget_earlier_lives()
                new = {name: -(-count // PAGE_TOKENS) for name, count in tokens.items()}
            self._loaded.update(new)

    def _forget_earlier_lives(self) -> None:
        if self._life != self._process.life:
            self._life = self._process.life
            self._loaded.clear()
