"""The Ray actor that veRL talks to: an HTTP proxy, no GPU, no model.

It asks the server for completions with the cartridge version it was told to use, and stamps every
answer with it. The server itself runs elsewhere: on Modal, on a GPU box, or embedded on this CPU.
"""

from __future__ import annotations

from typing import Any

from verl.workers.rollout.replica import TokenOutput

from cartridge_distill.client import ClientSettings, TokasaurusClient
from cartridge_distill.errors import ConfigError, RolloutError, SyncError
from cartridge_distill.sync import step_of
from cartridge_distill.wire import CartridgeRef


class TokasaurusHttpServer:
    """Proxy to one server.

    Args:
        url: of the server, e.g. ``http://127.0.0.1:10210``.
        response_length: ``max_tokens`` of each completion.
        vocab_size: ids outside it are refused.
        static_cartridges: fixed cartridges (``rollout.custom.cartridges``), for rollouts outside
            training; a training run refuses them.
        client_options: timeouts and retries, see :class:`cartridge_distill.client.ClientSettings`.
    """

    def __init__(
        self,
        url: str,
        response_length: int,
        vocab_size: int | None = None,
        static_cartridges: list[dict[str, Any]] | None = None,
        client_options: dict[str, Any] | None = None,
    ) -> None:
        self.response_length = response_length
        settings = ClientSettings(**(client_options or {}))
        self.client = TokasaurusClient(url, settings, vocab_size)
        self.static = [CartridgeRef(**ref) for ref in static_cartridges or []]
        self.version: str | None = None
        self.served: list[str] = []

    async def wait_until_ready(self) -> str:
        """Waits through a cold start; returns the server's model id.

        Raises:
            ServerUnreachable: no answer within the start-up time.
        """
        await self.client.wait_until_ready()
        models = await self.client.models()
        return models[0] if models else ""

    async def activate(self, version: str) -> None:
        """Makes ``version`` the one that later completions ask for.

        One token is generated with it first, so a version that the server cannot load fails the
        sync and not the next rollout.

        Raises:
            SyncError: the version was served before, or the server refuses it.
        """
        if version in self.served:
            raise SyncError(
                f"version {version} was active before; a server never loads an id twice"
            )
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
        """One completion, stamped with the version that made it.

        Raises:
            ConfigError: sampling parameters that Tokasaurus refuses.
            RolloutError: no version was synced yet, or the server's answer cannot be used.
        """
        if image_data or video_data:
            raise ConfigError(
                "the tokasaurus rollout is text only; the sample carries images or video"
            )
        _check_sampling(sampling_params)
        version = self.version
        if version is None:
            raise RolloutError(
                "no cartridge version was synced yet; a rollout would use the bare model"
            )
        completion = (
            await self.client.complete(
                prompt_ids,
                max_tokens=int(sampling_params.get("max_tokens", self.response_length)),
                temperature=float(sampling_params["temperature"]),
                cartridges=self.static if version is None else self._refs(version),
            )
        )[0]
        if not completion.token_ids:
            raise RolloutError(f"the server answered request {request_id} with no token")
        return TokenOutput(
            token_ids=completion.token_ids,
            log_probs=completion.logprobs,
            stop_reason="completed",
            extra_fields={
                "global_steps": None if version is None else step_of(version),
                "cartridge_version": version,
                "finish_reason": completion.finish_reason,
            },
        )

    async def close(self) -> None:
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
                f"set it to {neutral[0]}"
            )
