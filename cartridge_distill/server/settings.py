"""What can be set on the embedded server, with the defaults of its command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cartridge_distill.util.errors import ConfigError, require_counts
from cartridge_distill.util.http_front import IDLE_SECONDS, MAX_IDLE_SECONDS
from cartridge_distill.util.http_places import MAX_CONNECTIONS


@dataclass(frozen=True)
class ServerSettings:
    """Settings of one embedded server.

    Attributes:
        cartridge_dir: folder that holds ``{id}/cartridge.pt`` and ``{id}/config.yaml``.
        model_name: what ``/v1/models`` and the answers call the model.
        seed: all sampling follows from it, see ``sampling``.
        max_tokens_per_request: prompt + max_tokens may not exceed it; None takes the model's
            context. Cartridge tokens do not count, as on the real server.
        max_batch: rows computed at once; more wait in line.
        max_kv_tokens: bound on rows x longest row, which is what the KV buffers hold. One row is
            always let in.
        prefill_tokens: prompt tokens taken into one forward, over all rows.
        prefill_chunk: prompt tokens of one row taken into one forward.
        prefix_cache_tokens: tokens of prompts' common beginnings (a document before many questions)
            whose KV is kept; the least recently used go first. 0 keeps none.
        prefix_cache_min_tokens: beginnings shorter than this are not kept.
        cartridge_memory_gb: KV of loaded cartridges kept; beyond it the least recently used one
            goes, and its id is refused from then on (an id is never loaded twice).
        idle_s: a client that sends nothing of its request, or reads nothing of its answer, for so
            long is cut off.
        max_connections: open at once; see :mod:`cartridge_distill.util.http_places`.

    Raises:
        ConfigError: a setting that cannot work.
    """

    cartridge_dir: Path = Path("cartridges")
    model_name: str = "model"
    seed: int = 0
    max_tokens_per_request: int | None = None
    max_batch: int = 64
    max_kv_tokens: int = 65_536
    prefill_tokens: int = 4_096
    prefill_chunk: int = 512
    prefix_cache_tokens: int = 16_384
    prefix_cache_min_tokens: int = 128
    cartridge_memory_gb: float = 4.0
    idle_s: float = IDLE_SECONDS
    max_connections: int = MAX_CONNECTIONS

    def __post_init__(self) -> None:
        require_counts(self, "max_batch", "max_kv_tokens", "prefill_tokens", "prefill_chunk")
        require_counts(self, "prefix_cache_min_tokens", "max_connections")
        if self.prefix_cache_tokens < 0:
            raise ConfigError(
                f"prefix_cache_tokens={self.prefix_cache_tokens} is too few; fix: give 0 (keep "
                "none) or more"
            )
        if self.max_tokens_per_request is not None and self.max_tokens_per_request < 2:
            raise ConfigError(
                f"max_tokens_per_request={self.max_tokens_per_request}: a request needs one prompt "
                "token and one new token; fix: give 2 or more"
            )
        if self.cartridge_memory_gb <= 0:
            raise ConfigError(
                f"cartridge_memory_gb={self.cartridge_memory_gb} holds no cartridge; fix: give "
                "more than 0"
            )
        if not 0 < self.idle_s <= MAX_IDLE_SECONDS:
            raise ConfigError(
                f"idle_s={self.idle_s} is out of range; fix: give more than 0, at most "
                f"{MAX_IDLE_SECONDS:.0f}"
            )
