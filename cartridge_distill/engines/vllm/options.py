"""The settings of the connector and the front, which travel in vLLM's ``--kv-transfer-config``.

Both halves of the connector and the front read them there, in whichever process they run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.http_front import IDLE_SECONDS, MAX_IDLE_SECONDS

CONNECTOR = "CartridgeConnector"
CONNECTOR_MODULE = "cartridge_distill.engines.vllm.connector"
FRONT = "cartridge_distill.engines.vllm.front.CartridgeFront"


class Options(BaseModel):
    """What can be set. With ``cartridges`` the server speaks OpenAI's chat API, a cartridge is a
    model's name; with ``cartridge_dir`` it speaks the Tokasaurus protocol, for training."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    cartridges: dict[str, str] | None = None
    """files or folders of cartridges, by the name that requests ask for"""
    cartridge_dir: Path | None = None
    """holds one folder per cartridge id; it may fill while the server runs"""
    model_name: str | None = None
    """what the answers call the base model (default: vLLM's own name for it)"""
    resident_gb: float = Field(default=4.0, gt=0)
    """keys and values of cartridges kept on the device beside vLLM's cache, in 2^30 bytes; the
    least recently used go, and are read again when they are needed"""
    max_tokens_per_request: int | None = Field(default=None, ge=2)
    """prompt + max_tokens; the cartridge does not count (default: what the context leaves)"""
    seed: int = 0
    """requests with a seed of their own draw by this one, too"""
    idle_s: float = Field(default=IDLE_SECONDS, gt=0, le=MAX_IDLE_SECONDS)
    """a client that is silent for so long in the middle of a request is cut off"""
    allow_hosts: tuple[str, ...] = ()
    """further names of the server, as clients write them"""

    @model_validator(mode="after")
    def _one_source(self) -> Options:
        if (self.cartridges is None) == (self.cartridge_dir is None):
            raise ValueError("give cartridges, or cartridge_dir; one of them")
        if self.cartridge_dir is not None and not self.cartridge_dir.is_absolute():
            raise ValueError(f"cartridge_dir={self.cartridge_dir}: an absolute path is wanted")
        relative = [p for p in (self.cartridges or {}).values() if not Path(p).is_absolute()]
        if relative:
            raise ValueError(f"{relative[0]}: an absolute path is wanted")
        return self

    @classmethod
    def read(cls, extra: Mapping[str, Any]) -> Options:
        """From ``kv_connector_extra_config``.

        Raises:
            ConfigError: a setting that is unknown or cannot work.
        """
        try:
            return cls(**extra)
        except ValidationError as error:
            problem = error.errors(include_input=False)[0]
            place = ".".join(str(part) for part in problem["loc"]) or "all together"
            raise ConfigError(
                f"kv_connector_extra_config: {place}: {problem['msg']}; fix: start vLLM as "
                "`cartridge-distill serve --engine vllm` prints it"
            ) from error

    def transfer_config(self) -> dict[str, Any]:
        """The value of ``--kv-transfer-config``."""
        return {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": CONNECTOR_MODULE,
            "kv_role": "kv_consumer",
            # Recomputing would compute the placeholders.
            "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": self.model_dump(
                mode="json", exclude_none=True, exclude_defaults=True
            ),
        }
