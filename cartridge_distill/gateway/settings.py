"""What can be set on the gateway, with the defaults of its command line.

The bearer token is not here: it comes from the environment (:func:`token_from_environment`), so
that it stands in no command line, no log and no printed settings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cartridge_distill.cartridge.kv_shape import PAGE_TOKENS
from cartridge_distill.rollout.limits import MAX_CHOICES
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.http_front import IDLE_SECONDS, MAX_IDLE_SECONDS
from cartridge_distill.util.http_places import MAX_CONNECTIONS, OTHER_FILES

TOKEN_VARIABLE = "TOKASAURUS_API_KEY"
"""The same variable on both ends: the gateway asks for it, the client sends it."""
_SHORTEST_TOKEN = 16


class GatewaySettings(BaseModel):
    """Settings of one gateway, which owns one server process and one cartridge directory.

    Each field's description is also the command line's help.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str
    """folder or hub id of the base model; uploads are checked against its shape"""
    model_name: str | None = None
    """what uploads must name as their base model (default: the model)"""
    backend: Literal["embedded", "tokasaurus", "vllm"] = "embedded"
    """the server that is started: this project's own, Tokasaurus, or an unmodified vLLM"""
    engine_python: str | None = None
    """with backend=vllm: the Python of vLLM's own environment (python -m
    cartridge_distill.engines.vllm --make-environment DIR makes one: DIR/bin/python)"""
    server_args: tuple[str, ...] = ()
    """further arguments of the server process, as they are"""
    cartridge_dir: Path = Path("cartridges")
    """the server's cartridge directory; only the gateway writes into it"""
    server_port: int | None = Field(default=None, ge=1, le=65535)
    """loopback port of the server process (default: a free one)"""
    startup_timeout_s: float = Field(default=900.0, gt=0)
    """patience with a server process that loads its model"""
    hold_s: float = Field(default=300.0, ge=0)
    """how long a request waits for a server that is being started again, before 503"""
    drain_s: float = Field(default=60.0, ge=0)
    """how long what is in flight may take at SIGTERM, and before a planned restart"""
    stall_s: float = Field(default=600.0, gt=0)
    """the server is started again when requests are in flight and no byte came for so long"""
    max_inflight: int = Field(default=512, ge=1)
    """completions at once; more get 429"""
    max_request_bytes: int = Field(default=8 * 2**20, ge=1024)
    """body of a completion request"""
    max_request_tokens: int = Field(default=16_384, ge=2)
    """prompt tokens + max_tokens of a request"""
    max_choices: int = Field(default=64, ge=1, le=MAX_CHOICES)
    """n of a request"""
    max_cartridge_tokens: int = Field(default=8_192, ge=PAGE_TOKENS)
    """tokens of an uploaded cartridge"""
    max_uploads: int = Field(default=4, ge=1)
    """uploads at once; more get 429"""
    idle_s: float = Field(default=IDLE_SECONDS, gt=0, le=MAX_IDLE_SECONDS)
    """a client that sends nothing of its request or upload, or reads nothing of its answer, for so
    long is cut off"""
    max_connections: int = Field(default=MAX_CONNECTIONS, ge=1)
    """open at once; when more come, those go from which nothing has come for longest, and when all
    are being answered, more get 503"""
    keep_versions: int = Field(default=4, ge=1)
    """newest versions kept of each run; older ones go when no request uses them"""
    max_disk_gb: float = Field(default=20.0, gt=0)
    """bound on the versions in the cartridge directory, in 10^9 bytes; uploads under way come on
    top"""
    allow_remote_cartridges: bool = False
    """let requests name cartridges of huggingface and wandb; the real server unpickles what it
    downloads there, which may run foreign code"""
    defence: Literal["repair", "restart"] = "repair"
    """against the real server's block leak: repair its allocator inside its processes, or count
    pages and restart it before it runs out"""
    kv_cache_tokens: int = Field(default=131_072, ge=PAGE_TOKENS)
    """size of the real server's KV cache"""
    page_budget: int | None = Field(default=None, ge=1)
    """pages of 16 tokens that cartridges may take before a restart, with defence=restart
    (default: half of the cache)"""

    @field_validator("cartridge_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().resolve()

    @model_validator(mode="after")
    def _goes_with_backend(self) -> GatewaySettings:
        if (self.backend == "vllm") != (self.engine_python is not None):
            raise ValueError(
                f"backend={self.backend} and engine_python={self.engine_python}: vLLM has an "
                "environment of its own, whose Python is named with engine_python; the other "
                "backends run in this one"
            )
        if self.backend == "vllm" and self.allow_remote_cartridges:
            raise ValueError("allow_remote_cartridges: vLLM serves uploads alone; leave it out")
        return self

    @model_validator(mode="after")
    def _cartridge_fits_budget(self) -> GatewaySettings:
        pages = -(-self.max_cartridge_tokens // PAGE_TOKENS)
        if self.defence == "restart" and pages > self.pages_before_restart:
            raise ValueError(
                f"max_cartridge_tokens={self.max_cartridge_tokens} is {pages} pages, the page "
                f"budget is {self.pages_before_restart}: the server would be restarted for ever. "
                "Raise kv_cache_tokens or page_budget, or allow smaller cartridges only"
            )
        return self

    @property
    def pages_before_restart(self) -> int:
        """Pages that cartridges may take up in one life of the server (``defence=restart``)."""
        return self.page_budget or self.kv_cache_tokens // PAGE_TOKENS // 2

    @property
    def other_files(self) -> int:
        """File descriptors beside the clients' connections: the server's own, and uploads."""
        return OTHER_FILES + self.max_inflight + 4 * self.max_uploads

    @property
    def base_model(self) -> str:
        """The name of the base model that uploads must carry."""
        return self.model_name or self.model


def token_from_environment(environment: Mapping[str, str] = os.environ) -> str:
    """The bearer token that clients must send.

    Raises:
        ConfigError: not set, or too short to be one.
    """
    token = environment.get(TOKEN_VARIABLE, "")
    if len(token) < _SHORTEST_TOKEN:
        state = "not set" if not token else f"only {len(token)} characters long"
        raise ConfigError(
            f"{TOKEN_VARIABLE} is {state}; the gateway would stand open to whoever finds it; fix: "
            "make "
            'one with `python -c "import secrets; print(secrets.token_urlsafe(32))"` and export it '
            "here and where the client runs"
        )
    return token
