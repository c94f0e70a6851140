"""veRL's view of the server: a rollout replica that launches a proxy, and nothing on a GPU."""

from __future__ import annotations

from typing import Any

import ray
from transformers import AutoConfig
from verl.utils.fs import copy_to_local
from verl.workers.rollout.replica import RolloutReplica

from cartridge_distill.cartridge.kv_shape import text_config
from cartridge_distill.model.end_tokens import possible_end_ids
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.server_url import checked_url
from verl_patches.rollout.tokasaurus_rollout.server import TokasaurusHttpServer


def proxy_name(replica_rank: int, suffix: str = "") -> str:
    """The Ray name of a replica's proxy; the server adapter finds it by this name."""
    return f"tokasaurus_http_server_{replica_rank}{suffix}"


def proxies_of(replicas: int) -> list[Any]:
    """The proxies of so many replicas, as actor handles.

    Raises:
        ValueError: one is not there.
    """
    return [ray.get_actor(proxy_name(rank)) for rank in range(replicas)]


def server_urls(custom: Any) -> list[str]:
    """``rollout.custom.tokasaurus_url``: one URL or a list of them.

    Raises:
        ConfigError: none given, or one that holds a password.
    """
    given = (custom or {}).get("tokasaurus_url")
    urls = [given] if isinstance(given, str) else list(given or [])
    if not urls:
        raise ConfigError(
            "actor_rollout_ref.rollout.custom.tokasaurus_url is not set; fix: start a server with "
            "`cartridge-distill serve` or deploy one, and give its URL"
        )
    return [checked_url(url) for url in urls]


class TokasaurusReplica(RolloutReplica):
    """Replica r talks to URL r modulo the number of URLs."""

    async def launch_servers(self) -> None:
        """Starts the proxy and waits until the server answers.

        Raises:
            ServerUnreachable: the server does not answer within ``custom.startup_timeout_s``.
        """
        custom = dict(self.config.custom or {})
        urls = server_urls(custom)
        url = urls[self.replica_rank % len(urls)]
        # veRL hands the replica the bare YAML of the model, without its transformers config.
        folder = copy_to_local(self.model_config["path"])
        vocabulary = text_config(AutoConfig.from_pretrained(folder)).vocab_size
        proxy = (
            ray.remote(TokasaurusHttpServer)
            .options(
                name=proxy_name(self.replica_rank, self.name_suffix),
                num_cpus=0,
                max_concurrency=self.max_concurrency,
            )
            .remote(
                url=url,
                response_length=self.config.response_length,
                vocab_size=vocabulary,
                static_cartridges=[dict(ref) for ref in custom.get("cartridges") or []],
                client_options=dict(custom.get("client") or {}),
                sync_timeout_s=float(custom.get("sync_timeout_s") or 1800.0),
                end_ids=sorted(possible_end_ids(folder)) or None,
            )
        )
        await proxy.wait_until_ready.remote()
        self.servers = [proxy]
        self._server_handle = proxy
        self._server_address = url

    # veRL's lifecycle calls free and restore GPU memory that a rollout engine shares with the
    # trainer. The server's memory is its own, and one process serves every version, so there is
    # nothing to do. Each call is named: a misspelt one still fails.

    async def sleep(self) -> None:
        """The server keeps its memory."""

    async def wake_up(self) -> None:
        """The server never slept."""

    async def clear_kv_cache(self) -> None:
        """Every version has an id of its own, so no KV of another version can be reused."""

    async def release_kv_cache(self) -> None:
        """The server keeps its memory."""

    async def resume_kv_cache(self) -> None:
        """The server kept its memory."""

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        raise ConfigError(
            "partial rollout is not supported by the tokasaurus rollout; fix: use "
            "trainer_mode=cartridge"
        )

    async def resume_generation(self) -> None:
        raise ConfigError(
            "partial rollout is not supported by the tokasaurus rollout; fix: use "
            "trainer_mode=cartridge"
        )
