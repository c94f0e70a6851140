"""Asking a server for rollouts: what is sent, what comes back, and the labels.

The proxy asks, and so does each agent loop's process. Which version is asked for is theirs to know;
the label of an answer is the version of the very request that it answers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from verl.workers.rollout.replica import TokenOutput

from cartridge_distill.distill.mixing import STUDENT, TEACHER
from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.http import ClientSettings
from cartridge_distill.rollout.protocol import CartridgeRef
from cartridge_distill.sync.versions import step_of
from cartridge_distill.util.errors import ConfigError, RolloutError


@dataclass(frozen=True)
class ServerSettings:
    """One server, and how it is asked. Goes from process to process.

    Attributes:
        url: of the server, e.g. ``http://127.0.0.1:10210``.
        response_length: ``max_tokens`` of each completion.
        vocab_size: ids outside it are refused.
        static_cartridges: fixed cartridges (``rollout.custom.cartridges``), for rollouts outside
            training; a training run refuses them.
        client_options: timeouts and retries, see
            :class:`cartridge_distill.rollout.http.ClientSettings`.
        end_ids: with which the server may end an answer; one that ended otherwise is asked for
            again. None where nobody knows.
    """

    url: str
    response_length: int
    vocab_size: int | None = None
    static_cartridges: list[dict[str, Any]] = field(default_factory=list)
    client_options: dict[str, Any] = field(default_factory=dict)
    end_ids: Collection[int] | None = None


class Asking:
    """Asks one server.

    Attributes:
        client: of the server.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._response_length = settings.response_length
        end_ids = None if settings.end_ids is None else frozenset(settings.end_ids)
        patience = ClientSettings(**settings.client_options)
        self.client = TokasaurusClient(settings.url, patience, settings.vocab_size, end_ids)
        self._static = [CartridgeRef(**ref) for ref in settings.static_cartridges]

    def refs(self, version: str) -> list[CartridgeRef]:
        """What a request names, for this version."""
        return [CartridgeRef(id=version, source="local"), *self._static]

    async def ask(
        self,
        request_id: str,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        version_for: Callable[[dict[str, Any]], Awaitable[str]],
    ) -> TokenOutput:
        """One completion, labelled with the version that made it.

        ``sampling_params`` with ``author="teacher"`` asks the bare model, for a prompt that begins
        with its document: no cartridge, no version, and no waiting for the version on its way.

        Args:
            version_for: from the sampling parameters to the version to ask for.

        Raises:
            ConfigError: sampling parameters that Tokasaurus refuses.
            RolloutError: the server's answer cannot be used.
            Whatever ``version_for`` raises.
        """
        _check_sampling(sampling_params)
        by_teacher = sampling_params.get("author", STUDENT) == TEACHER
        version = None if by_teacher else await version_for(sampling_params)
        completion = (
            await self.client.complete(
                prompt_ids,
                max_tokens=int(sampling_params.get("max_tokens", self._response_length)),
                temperature=float(sampling_params["temperature"]),
                cartridges=[] if version is None else self.refs(version),
                seed=sampling_params.get("seed"),
            )
        )[0]
        if not completion.token_ids:
            raise RolloutError(
                f"the server answered request {request_id} with no token; fix: look into its log"
            )
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
