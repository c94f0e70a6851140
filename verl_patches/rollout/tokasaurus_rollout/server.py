"""The Ray actor that stands for a server in veRL: a proxy, no GPU, no model.

It is in charge of versions: which one is on its way, which one completions ask for, and whether the
server serves it. The agent loops ask it for the version and the server for the answer (``direct``);
whoever calls it as veRL's own client does gets the same answer through it. The server itself runs
elsewhere: on Modal, on a GPU box, or embedded on this CPU.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

from verl.workers.rollout.replica import TokenOutput

from cartridge_distill.distill.on_policy import OLDEST_STEP
from cartridge_distill.sync.versions import step_of
from cartridge_distill.util.errors import ConfigError, RolloutError, SyncError
from verl_patches.rollout.tokasaurus_rollout.asking import Asking, ServerSettings


class TokasaurusHttpServer:
    """Proxy to one server.

    Args:
        url, response_length, vocab_size, static_cartridges, client_options, end_ids: as
            :class:`.asking.ServerSettings` has them.
        sync_timeout_s: how long a rollout waits for a version that is on its way.
    """

    def __init__(
        self,
        url: str,
        response_length: int,
        vocab_size: int | None = None,
        static_cartridges: list[dict[str, Any]] | None = None,
        client_options: dict[str, Any] | None = None,
        sync_timeout_s: float = 1800.0,
        end_ids: Collection[int] | None = None,
    ) -> None:
        self._settings = ServerSettings(
            *(url, response_length, vocab_size, static_cartridges or [], client_options or {}),
            end_ids,
        )
        self._asking = Asking(self._settings)
        self.client = self._asking.client
        self.sync_timeout_s = sync_timeout_s
        self.version: str | None = None
        self.served: list[str] = []
        self._expected: str | None = None
        self._settled = asyncio.Event()  # no version is on its way
        self._settled.set()
        self._failure: str | None = None

    async def wait_until_ready(self) -> str:
        """Waits through a cold start; returns the server's model id.

        Raises:
            ServerUnreachable: no answer within the start-up time.
        """
        await self.client.wait_until_ready()
        models = await self.client.models()
        return models[0] if models else ""

    async def expect(self, version: str) -> None:
        """``version`` is on its way: rollouts asked for from now on wait for it.

        Raises:
            SyncError: it was served before.
        """
        if version in self.served:
            raise SyncError(
                f"version {version} was active before; a server never loads an id twice"
            )
        self._expected = version
        self._failure = None
        self._settled.clear()

    async def activate(self, version: str) -> None:
        """Makes ``version`` the one that completions ask for.

        One token is generated with it first, so a version that the server cannot load fails the
        sync and not the next rollout.

        Raises:
            SyncError: another one is expected, or the server refuses it.
        """
        if version != self._expected:
            raise SyncError(f"version {version} arrived, version {self._expected} is expected")
        try:
            await self.client.complete(
                [0], max_tokens=1, temperature=0.0, cartridges=self._asking.refs(version)
            )
        except RolloutError as error:
            raise SyncError(
                f"the server does not serve cartridge version {version}: {error}"
            ) from error
        self.version = version
        self.served.append(version)
        self._settled.set()

    async def give_up(self, version: str, reason: str) -> None:
        """``version`` will not come: rollouts that wait for it fail with the reason."""
        if version == self._expected:
            self._failure = reason
            self._settled.set()

    async def current(self) -> str:
        """The version that completions ask for, once it is there.

        Raises:
            SyncError: none was ever synced, or the one on its way did not arrive.
        """
        try:
            await asyncio.wait_for(self._settled.wait(), self.sync_timeout_s)
        except TimeoutError:
            raise SyncError(
                f"cartridge version {self._expected} did not arrive within "
                f"{self.sync_timeout_s:.0f} s; the trainer that publishes it is gone, or the "
                "upload is slower than that; fix: raise rollout.custom.sync_timeout_s"
            ) from None
        if self._failure is not None:
            raise SyncError(f"cartridge version {self._expected} did not arrive: {self._failure}")
        if self.version is None:
            raise SyncError(
                "no cartridge version was synced yet; a rollout would use the bare model"
            )
        return self.version

    async def _newest(self, oldest_step: int) -> str:
        """The newest version that is there, without waiting for the next where it will do.

        Args:
            oldest_step: an older version than this is waited out.

        Raises:
            SyncError: none such is there, and none is on its way, or it did not arrive.
        """
        if self.version is not None and step_of(self.version) >= oldest_step:
            return self.version
        version = await self.current()
        if step_of(version) < oldest_step:
            raise SyncError(
                f"a rollout wants version {oldest_step} or newer; {version} is served, and no "
                "other is on its way"
            )
        return version

    async def version_for(self, oldest_step: int | None) -> str:
        """The version that a rollout asks for.

        Args:
            oldest_step: of one that is asked for ahead, see :data:`OLDEST_STEP`; else None.

        Raises:
            SyncError: none was ever synced, or the one on its way did not arrive.
        """
        return await (self.current() if oldest_step is None else self._newest(oldest_step))

    async def versions_served(self) -> list[str]:
        """Every version activated so far, in order."""
        return list(self.served)

    async def settings(self) -> ServerSettings:
        """How the server is asked, for whoever asks it itself."""
        return self._settings

    async def generate(
        self,
        request_id: str,
        *,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        image_data: Any = None,
        video_data: Any = None,
    ) -> TokenOutput:
        """One completion, as :meth:`.asking.Asking.ask` makes it.

        Raises:
            ConfigError: sampling parameters that Tokasaurus refuses.
            SyncError: no version was synced yet, or the one on its way did not arrive.
            RolloutError: the server's answer cannot be used.
        """
        if image_data or video_data:
            raise ConfigError(
                "the tokasaurus rollout is text only, and the sample carries images or video; fix: "
                "take them out"
            )

        async def version_for(params: dict[str, Any]) -> str:
            return await self.version_for(params.get(OLDEST_STEP))

        return await self._asking.ask(request_id, prompt_ids, sampling_params, version_for)

    async def close(self) -> None:
        """Closes the connections to the server."""
        await self.client.close()
