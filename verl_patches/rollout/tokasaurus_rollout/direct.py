"""The agent loop's own way to the servers: it asks them itself, and the proxies for versions alone.

A call of a Ray actor takes about two milliseconds, and the proxy is one process: every rollout
through it would wait for that, and all of them together for its one core. So an agent loop's
process has connections of its own. What it must not have is an opinion on versions: it takes what
the proxy says. A version is known without asking only where the rollout names the step of the one
version that may answer (:data:`ONLY_STEP`), and the proxy has given the version of that step
before.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from verl.utils.rollout_trace import rollout_trace_op
from verl.workers.rollout.replica import TokenOutput

from cartridge_distill.distill.on_policy import OLDEST_STEP, ONLY_STEP
from cartridge_distill.sync.versions import step_of
from verl_patches.rollout.tokasaurus_rollout.asking import Asking

_Wanted = tuple[int | None, int | None]


@dataclass
class _Server:
    proxy: Any  # the Ray actor in charge of its versions
    asking: Asking
    version: str | None = None  # as the proxy last gave it
    in_flight: int = 0
    questions: dict[_Wanted, asyncio.Task[str]] = field(default_factory=dict)

    async def version_for(self, params: dict[str, Any]) -> str:
        """The version that a rollout asks for."""
        only, oldest = params.get(ONLY_STEP), params.get(OLDEST_STEP)
        if only is not None and self.version is not None and step_of(self.version) == only:
            return self.version
        if only is None and oldest is None:  # it must be the newest one of this very moment
            return await self._ask(None)
        # Rollouts of one batch are asked for together, and one question is enough for them.
        question = self.questions.get((only, oldest))
        if question is None:
            question = asyncio.create_task(self._ask(oldest))
            self.questions[only, oldest] = question
            question.add_done_callback(lambda done: self._answered((only, oldest), done))
        return await asyncio.shield(question)  # who gives up takes it from nobody else

    async def _ask(self, oldest: int | None) -> str:
        version: str = await self.proxy.version_for.remote(oldest)
        self.version = version
        return version

    def _answered(self, wanted: _Wanted, question: asyncio.Task[str]) -> None:
        del self.questions[wanted]
        if not question.cancelled():
            question.exception()  # those who wait have it; nobody may be left


class DirectClient:
    """In the place of veRL's client of the rollout servers, in an agent loop's process.

    Args:
        find_proxies: the Ray actors, a replica each; called at the first request.
        tokenizer: for veRL's traces, where they show text.
    """

    def __init__(self, find_proxies: Callable[[], Sequence[Any]], tokenizer: Any = None) -> None:
        self._find_proxies = find_proxies
        self.tokenizer = tokenizer
        self._servers: asyncio.Task[list[_Server]] | None = None

    async def _all(self) -> list[_Server]:
        """The servers, known from the first request on."""
        if self._servers is None or (self._servers.done() and self._servers.exception()):
            self._servers = asyncio.create_task(self._connect())
        return await asyncio.shield(self._servers)

    async def _connect(self) -> list[_Server]:
        proxies = self._find_proxies()
        settings = await asyncio.gather(*[proxy.settings.remote() for proxy in proxies])
        pairs = zip(proxies, map(Asking, settings), strict=True)
        return [_Server(proxy, asking) for proxy, asking in pairs]

    @rollout_trace_op
    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]
    ) -> TokenOutput:
        """One completion, by the server with the fewest requests of this process in flight.

        Raises:
            ConfigError: sampling parameters that Tokasaurus refuses.
            SyncError: no version was synced yet, or the one on its way did not arrive.
            RolloutError: the server's answer cannot be used.
        """
        servers = await self._all()
        fewest = min(server.in_flight for server in servers)
        server = random.choice([server for server in servers if server.in_flight == fewest])
        server.in_flight += 1
        try:
            output = await server.asking.ask(
                request_id, prompt_ids, sampling_params, server.version_for
            )
        finally:
            server.in_flight -= 1
        step = output.extra_fields.get("global_steps")
        # As veRL's client labels an answer: the versions that it began and ended with.
        output.extra_fields |= {"min_global_steps": step, "max_global_steps": step}
        return output

    async def close(self) -> None:
        """Closes the connections to the servers."""
        for server in await self._all() if self._servers is not None else []:
            await server.asking.client.close()
