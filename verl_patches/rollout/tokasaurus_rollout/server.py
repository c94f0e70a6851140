"""The Ray actor that veRL talks to: an HTTP proxy, no GPU, no model.

It asks the server for completions with the cartridge version it was told to use, and labels every
answer with it. The teacher's answers, whose prompts begin with the document, go the same way
without a cartridge. The server itself runs elsewhere: on Modal, on a GPU box, or embedded on this
CPU.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

from verl.workers.rollout.replica import TokenOutput

from cartridge_distill.distill.mixing import STUDENT, TEACHER
from cartridge_distill.distill.on_policy import OLDEST_STEP
from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.http import ClientSettings
from cartridge_distill.rollout.protocol import CartridgeRef
from cartridge_distill.sync.versions import step_of
from cartridge_distill.util.errors import ConfigError, RolloutError, SyncError


class TokasaurusHttpServer:
    """Proxy to one server.

    Args:
        url: of the server, e.g. ``http://127.0.0.1:10210``.
        response_length: ``max_tokens`` of each completion.
        vocab_size: ids outside it are refused.
        end_ids: with which the server may end an answer; one that ended otherwise is asked for
            again. None where nobody knows.
        static_cartridges: fixed cartridges (``rollout.custom.cartridges``), for rollouts outside
            training; a training run refuses them.
        client_options: timeouts and retries, see
            :class:`cartridge_distill.rollout.http.ClientSettings`.
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
        self.response_length = response_length
        settings = ClientSettings(**(client_options or {}))
        self.client = TokasaurusClient(
            url, settings, vocab_size, None if end_ids is None else frozenset(end_ids)
        )
        self.static = [CartridgeRef(**ref) for ref in static_cartridges or []]
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
                [0], max_tokens=1, temperature=0.0, cartridges=self._refs(version)
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

    async def versions_served(self) -> list[str]:
        """Every version activated so far, in order."""
        return list(self.served)

    def _refs(self, version: str) -> list[CartridgeRef]:
        return [CartridgeRef(id=version, source="local"), *self.static]

    async def generate(
        self,
        request_id: str,
        *,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        image_data: Any = None,
        video_data: Any = None,
    ) -> TokenOutput:
        """One completion, labelled with the version that made it.

        ``sampling_params`` with ``author="teacher"`` asks the bare model, for a prompt that begins
        with its document: no cartridge, no version, and no waiting for the version on its way.

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
        _check_sampling(sampling_params)
        by_teacher = sampling_params.get("author", STUDENT) == TEACHER
        version = None
        if not by_teacher:
            oldest = sampling_params.get(OLDEST_STEP)
            version = await (self.current() if oldest is None else self._newest(oldest))
        completion = (
            await self.client.complete(
                prompt_ids,
                max_tokens=int(sampling_params.get("max_tokens", self.response_length)),
                temperature=float(sampling_params["temperature"]),
                cartridges=[] if version is None else self._refs(version),
                seed=sampling_params.get("seed"),
            )
        )[0]
        if not completion.token_ids:
            raise RolloutError(f"the server answered request {request_id} with no token")
        labels: dict[str, Any] = {"author": TEACHER, "finish_reason": completion.finish_reason}
        if version is not None:
            labels |= {
                "author": STUDENT,
                "global_steps": step_of(version),
                "cartridge_version": version,
            }
        return TokenOutput(
            token_ids=completion.token_ids,
            log_probs=completion.logprobs,
            stop_reason="completed",
            extra_fields=labels,
        )

    async def close(self) -> None:
        """Closes the connections to the server."""
        await self.client.close()


def _check_sampling(params: dict[str, Any]) -> None:
    for name, neutral in (
        ("top_p", (1, None)),
        ("top_k", (-1, 0, None)),
        ("repetition_penalty", (1, None)),
    ):
        if params.get(name) not in neutral:
            raise ConfigError(
                f"{name}={params[name]}: Tokasaurus samples from the whole distribution only; "
                f"fix: set it to {neutral[0]}"
            )
