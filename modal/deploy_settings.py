"""Settings of the two deployments, read from the environment by ``modal deploy`` and ``modal run``.

One frozen object per deployment, one environment variable per field: ``gpu`` of
:class:`ServerSettings` is ``CARTRIDGE_SERVER_GPU``. A variable that begins like a setting and is
none is an error, because a misspelt one would otherwise leave its default in place, silently.

Modal imports the deployment's file twice: on the machine that deploys, and in the container, where
the variables of the first are not set. ``as_environment`` carries the settings over.

No credentials here: those are Modal secrets, and only their names are settings.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from cartridge_distill.cartridge.kv_shape import PAGE_TOKENS
from cartridge_distill.gateway.settings import GatewaySettings
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.known_hosts import KnownHosts

NOTHING = "none"
"""What a variable holds to leave an optional setting empty."""
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
# torch 2.6 for CUDA 12.4 brings kernels up to compute capability 9.0.
_TOO_NEW_FOR_TORCH_26 = ("B100", "B200", "B300", "GB200", "RTX-PRO-6000")
_OWN_ARGUMENTS = {
    "model": "CARTRIDGE_SERVER_MODEL",
    "tokenizer": "CARTRIDGE_SERVER_MODEL",
    "port": "nothing: the gateway chooses it",
    "cartridge_dir": "nothing: it is the Volume",
    "kv_cache_num_tokens": "CARTRIDGE_SERVER_KV_CACHE_TOKENS",
    "max_num_tokens_per_request": "CARTRIDGE_SERVER_MAX_REQUEST_TOKENS",
    "page_size": "nothing: cartridges are built of pages of 16 tokens",
    "use_hydragen": "nothing: it counts a cartridge's keys twice and stays off",
    "tp_size": "nothing: cartridges on several GPUs have not been tested",
    "dp_size": "nothing: an uploaded cartridge would reach one of the engines",
    "pp_size": "nothing: cartridges on several GPUs have not been tested",
}


def _words(value: object) -> object:
    return tuple(shlex.split(value)) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class DeploySettings(BaseModel):
    """Reading from and writing to an environment; the fields are in the subclasses."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    prefix: ClassVar[str]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Settings of the variables that are set and not empty, and defaults for the rest.

        Raises:
            ConfigError: naming every variable that is wrong, its value and the fix.
        """
        given: dict[str, str | None] = {}
        for variable, value in environment.items():
            if variable.startswith(cls.prefix) and value.strip():
                text = value.strip()
                field = variable.removeprefix(cls.prefix).lower()
                given[field] = None if text.lower() == NOTHING else text
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            problems = [cls._in_words(dict(problem)) for problem in error.errors()]
            raise ConfigError("\n".join(problems)) from None

    @classmethod
    def _in_words(cls, problem: Mapping[str, Any]) -> str:
        if not problem["loc"]:  # found by a check of the whole object, which names its variables
            return str(problem["msg"]).removeprefix("Value error, ")
        field = str(problem["loc"][0])
        variable, value = cls.variable(field), problem["input"]
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, cls.model_fields, n=1, cutoff=0.5)
            fix = f"did you mean {cls.variable(near[0])}?" if near else "see modal/README.md"
            return f"{variable}={value}: there is no such setting; {fix}"
        message = str(problem["msg"]).removeprefix("Value error, ")
        return f"{variable}={NOTHING if value is None else value}: {message}"

    @classmethod
    def variable(cls, field: str) -> str:
        """The environment variable of a field."""
        return cls.prefix + field.upper()

    def as_environment(self) -> dict[str, str]:
        """Every setting as its variable: ``from_environment`` of it is this object again."""
        written: dict[str, str] = {}
        for field in type(self).model_fields:
            value = getattr(self, field)
            if value is None:
                written[self.variable(field)] = NOTHING
            elif isinstance(value, tuple):
                written[self.variable(field)] = shlex.join(value)
            else:
                written[self.variable(field)] = str(value)
        return written


def _one_gpu(value: str) -> str:
    kind, _, count = value.partition(":")
    if not re.fullmatch(r"[A-Za-z0-9!-]+", kind):
        raise ValueError("give one GPU by Modal's name, such as L40S, A100-80GB or H100")
    if count not in ("", "1"):
        raise ValueError(f"several GPUs in one container are not supported; say {kind}")
    return kind.upper()


class ServerSettings(DeploySettings):
    """The rollout server: ``modal deploy modal/modal_tokasaurus.py``.

    Attributes:
        app_name: name of the Modal app; the URL is ``<workspace>--<app_name>-serve.modal.run``.
        gpu: one GPU by Modal's name; compute capability 9.0 at most (torch 2.6).
        cpu, memory_mib: cores and memory asked for.
        model, model_revision: hub id and revision of the base model, baked into the image.
        tokasaurus_repository, tokasaurus_commit: which Tokasaurus is installed.
        flashinfer_index: where compiled wheels of FlashInfer are looked for, before PyPI.
        warm_build: start the server once while the image is built, on that GPU: FlashInfer compiles
            its kernels there and not at every cold start, and what is broken fails the deployment.
        kv_cache_tokens: tokens in the KV cache, cartridges included; a multiple of 16.
        server_args: further ``key=value`` arguments of Tokasaurus, separated by spaces.
        defence, page_budget: against Tokasaurus' block leak, see the gateway's settings.
        max_inflight, max_uploads, max_request_tokens, max_cartridge_tokens: limits of the gateway.
        keep_versions, max_disk_gb: how much of the Volume cartridges may take.
        allow_remote_cartridges: cartridges of the hub and of wandb, which the server unpickles.
        allow_hosts: names that the gateway answers to, separated by spaces; every name by default.
        proxy_auth: Modal asks for Modal-Key and Modal-Secret before a container is even started.
        min_containers: 0 scales to zero.
        max_containers: more than one needs ``allow_several_containers``.
        allow_several_containers: an upload reaches one container only; say yes when nothing is
            uploaded, for example to serve finished cartridges.
        scaledown_window_s: how long an idle container is kept, and paid for.
        startup_timeout_s: patience with the server process while it loads the model.
        request_timeout_s: longest request.
        commit_uploads: commit the Volume before an upload is answered; otherwise Modal's background
            commits follow within seconds.
        volume: name of the Volume that holds the cartridges.
        hf_secret, gateway_secret: names of Modal secrets (``HF_TOKEN``, ``TOKASAURUS_API_KEY``).
    """

    prefix: ClassVar[str] = "CARTRIDGE_SERVER_"

    app_name: Name = "tokasaurus-cartridge-server"
    gpu: Annotated[str, BeforeValidator(_one_gpu)] = "H100"
    cpu: float = Field(default=4.0, gt=0)
    memory_mib: int = Field(default=32_768, ge=1024)
    model: str = Field(default="meta-llama/Llama-3.2-3B-Instruct", pattern=r"^[\w.-]+/[\w.-]+$")
    model_revision: str = Field(default="main", pattern=r"^[\w./-]+$")
    tokasaurus_repository: str = Field(
        default="https://github.com/ScalingIntelligence/tokasaurus", pattern=r"^https://\S+$"
    )
    tokasaurus_commit: str = "845f115f5bc38aee266821a094fba1cd702dafff"
    flashinfer_index: str = Field(
        default="https://flashinfer.ai/whl/cu124/torch2.6/", pattern=r"^https://\S+$"
    )
    warm_build: bool = True
    kv_cache_tokens: int = Field(default=131_072, ge=PAGE_TOKENS, multiple_of=PAGE_TOKENS)
    server_args: Words = ()
    defence: Literal["repair", "restart"] = "repair"
    page_budget: int | None = Field(default=None, ge=1)
    max_inflight: int = Field(default=512, ge=1)
    max_uploads: int = Field(default=4, ge=1)
    max_request_tokens: int = Field(default=16_384, ge=2)
    max_cartridge_tokens: int = Field(default=8_192, ge=PAGE_TOKENS)
    keep_versions: int = Field(default=4, ge=1)
    max_disk_gb: float = Field(default=20.0, gt=0)
    allow_remote_cartridges: bool = False
    allow_hosts: Words = ()
    proxy_auth: bool = True
    min_containers: int = Field(default=0, ge=0)
    max_containers: int = Field(default=1, ge=1)
    allow_several_containers: bool = False
    scaledown_window_s: int = Field(default=300, ge=2, le=3600)
    startup_timeout_s: int = Field(default=900, ge=1)
    request_timeout_s: int = Field(default=900, ge=1)
    commit_uploads: bool = True
    volume: Name = "cartridge-versions"
    hf_secret: Name = "huggingface-secret"
    gateway_secret: Name = "cartridge-gateway-secret"

    @field_validator("gpu")
    @classmethod
    def _torch_knows_it(cls, value: str) -> str:
        if value.startswith(_TOO_NEW_FOR_TORCH_26):
            raise ValueError("torch 2.6 for CUDA 12.4 has no kernels for it; take H100 or H200")
        return value

    @field_validator("tokasaurus_commit")
    @classmethod
    def _pinned(cls, value: str) -> str:
        if not _COMMIT.fullmatch(value):
            raise ValueError(
                "not a commit. A branch would be another program after the next push, and the "
                "image cache would hide it: give the hash, as `git ls-remote` prints it"
            )
        return value

    @field_validator("server_args")
    @classmethod
    def _not_ours(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for argument in value:
            key, equals, _ = argument.partition("=")
            if not equals or not key.isidentifier():
                raise ValueError(f"{argument!r} is not key=value, which is how Tokasaurus is set")
            if key in _OWN_ARGUMENTS:
                raise ValueError(f"{key} is set by the deployment; use {_OWN_ARGUMENTS[key]}")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        low, high = self.variable("min_containers"), self.variable("max_containers")
        if self.min_containers > self.max_containers:
            raise ValueError(
                f"{low}={self.min_containers} is more than {high}={self.max_containers}: "
                "lower the first or raise the second"
            )
        if self.max_containers > 1 and not self.allow_several_containers:
            raise ValueError(
                f"{high}={self.max_containers}: an uploaded cartridge reaches one container, and "
                "requests for it land in any. Deploy several apps under different "
                f"{self.variable('app_name')}s and {self.variable('volume')}s and give the trainer "
                f"all their URLs, or set {self.variable('allow_several_containers')}=true if "
                "nothing is uploaded"
            )
        KnownHosts(more=self.allow_hosts)
        try:
            self.gateway(model=Path("/weights"), cartridge_dir=Path("/cartridges"))
        except ValidationError as error:
            found = [(".".join(map(str, problem["loc"])), problem) for problem in error.errors()]
            raise ValueError(
                "; ".join(
                    (f"{self.variable(where)}={problem['input']}: " if where else "")
                    + problem["msg"].removeprefix("Value error, ")
                    for where, problem in found
                )
            ) from None
        return self

    def gateway(self, model: Path, cartridge_dir: Path) -> GatewaySettings:
        """What the gateway in the container is given.

        Args:
            model: folder of the base model's weights.
            cartridge_dir: where the Volume is mounted.
        """
        return GatewaySettings(
            model=str(model),
            model_name=self.model,
            backend="tokasaurus",
            server_args=self.tokasaurus_arguments(),  # the gateway adds those it has settings for
            cartridge_dir=cartridge_dir,
            startup_timeout_s=self.startup_timeout_s,
            max_inflight=self.max_inflight,
            max_request_tokens=self.max_request_tokens,
            max_cartridge_tokens=self.max_cartridge_tokens,
            max_uploads=self.max_uploads,
            keep_versions=self.keep_versions,
            max_disk_gb=self.max_disk_gb,
            allow_remote_cartridges=self.allow_remote_cartridges,
            defence=self.defence,
            kv_cache_tokens=self.kv_cache_tokens,
            page_budget=self.page_budget,
        )

    def tokasaurus_arguments(self) -> tuple[str, ...]:
        """Tokasaurus' own arguments, beside those that the gateway sets."""
        return ("use_hydragen=F", *self.server_args)


class TrainSettings(DeploySettings):
    """Training on a rented GPU: ``modal run modal/modal_train.py``.

    What is trained is said on the command line; this is the machine.

    Attributes:
        app_name: name of the Modal app.
        gpu: one GPU by Modal's name.
        cpu, memory_mib: cores and memory asked for.
        timeout_h: hours one attempt may take; Modal ends it then, and it is started again.
        max_retries: attempts after the first one.
        startup_timeout_s: patience with the container's start.
        wait_s: patience with the rollout server, its cold start included.
        volume: name of the Volume with runs, data and the model cache.
        hf_secret, gateway_secret: names of Modal secrets (``HF_TOKEN``, ``TOKASAURUS_API_KEY``).
        proxy_secret: name of the one with ``MODAL_PROXY_KEY`` and ``MODAL_PROXY_SECRET``, or none.
        wandb_secret: name of the one with ``WANDB_API_KEY``; none logs to console and file only.
    """

    prefix: ClassVar[str] = "CARTRIDGE_TRAIN_"

    app_name: Name = "cartridge-training"
    gpu: Annotated[str, BeforeValidator(_one_gpu)] = "A100-80GB"
    cpu: float = Field(default=8.0, gt=0)
    memory_mib: int = Field(default=65_536, ge=1024)
    timeout_h: float = Field(default=24.0, gt=0, le=24)
    max_retries: int = Field(default=8, ge=0, le=10)
    startup_timeout_s: int = Field(default=900, ge=1)
    wait_s: int = Field(default=1200, ge=1)
    volume: Name = "cartridge-training"
    hf_secret: Name = "huggingface-secret"
    gateway_secret: Name = "cartridge-gateway-secret"
    proxy_secret: Name | None = "cartridge-proxy-secret"
    wandb_secret: Name | None = None
