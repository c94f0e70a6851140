"""Tokasaurus behind the gateway, on a rented GPU.

    modal deploy modal/modal_tokasaurus.py      # prints the URL; modal/README.md has what it needs

What is served is this project's gateway (``cartridge_distill.gateway``): it starts Tokasaurus on
loopback, takes uploads of cartridges, and asks for the bearer token. Modal adds the GPU, TLS, its
own authentication in front, a Volume that outlives the container, and scale to zero. This file is
only the image and the wiring; what can be set is :class:`deploy_settings.ServerSettings`.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_settings import ServerSettings

import modal

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
IN_IMAGE = "/opt/cartridge-distill"  # this project's code, beside the interpreter's own packages
CARTRIDGES = Path("/cartridges")  # the Volume
REPAIR = "python -m verl_patches apply --package tokasaurus"
BESIDE_THIS_FILE = "/root"  # where Modal puts and imports this file in every container
PORT_OF_WARM_UP = 10210
# Requests beside completions and uploads that must get through when both are at their limits:
# pings, lists, metrics, and completions that are to be told 429 by the gateway.
SPARE_REQUESTS = 64
# Modal's patience covers the gateway's, and the imports before it.
CONTAINER_START_S = 180

PYTHON = "3.11"
UV = "0.13.9"
# Tokasaurus' branch was last changed in August 2025 and pins little. Its dependencies are those of
# that time: these are the direct ones, and uv resolves what they need among the same releases.
AS_OF = "2025-09-01"
PACKAGES = (
    # pinned by Tokasaurus itself
    "torch==2.6.0",
    "transformers==4.53.0",
    # needed by Tokasaurus
    "accelerate==1.10.1",
    "art==6.5",
    "fastapi==0.116.1",
    "huggingface-hub==0.34.4",
    "loguru==0.7.3",
    "ninja==1.13.0",
    "numpy==2.3.2",
    "openai==1.102.0",
    "psutil==7.0.0",
    "pydra-config==0.0.17.post1",
    "python-multipart==0.0.20",
    "requests==2.32.5",
    "safetensors==0.6.2",
    "setuptools==80.9.0",
    "statsd==4.0.1",
    "tabulate==0.9.0",
    "tqdm==4.67.1",
    "typer==0.17.3",
    "uvicorn==0.35.0",
    "wandb==0.21.3",
    # needed by the gateway
    "aiohttp==3.12.15",
    "httptools==0.6.4",
    "httpx==0.28.1",
    "prometheus-client==0.22.1",
    "pydantic==2.11.7",
    "pyyaml==6.0.2",
    "tenacity==9.1.2",
    "uvloop==0.21.0",
)
FLASHINFER = "flashinfer-python==0.2.0.post2"
WEIGHT_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def weights_folder(settings: ServerSettings) -> Path:
    """Where the base model lies in the image: a plain folder, so that the server needs no hub."""
    return Path("/weights") / settings.model


def download_command(settings: ServerSettings) -> str:
    """The shell command that fetches the weights; ``HF_TOKEN`` comes from the secret."""
    call = (
        "from huggingface_hub import snapshot_download; "
        f"snapshot_download({settings.model!r}, revision={settings.model_revision!r}, "
        f"local_dir={str(weights_folder(settings))!r}, allow_patterns={WEIGHT_FILES!r}, "
        "ignore_patterns=['original/*'])"
    )
    return f"python -c {shlex.quote(call)}"


def warm_up_command(settings: ServerSettings) -> str:
    """The shell command that lets Tokasaurus generate once while the image is built."""
    server = ["toka", f"model={weights_folder(settings)}", f"port={PORT_OF_WARM_UP}"]
    server.append(f"kv_cache_num_tokens={settings.kv_cache_tokens}")
    script = ["python", "/opt/warm_up.py", "--url", f"http://127.0.0.1:{PORT_OF_WARM_UP}"]
    script += ["--patience", str(settings.startup_timeout_s + 600), "--"]  # compiling takes a while
    return shlex.join([*script, *server, *settings.tokasaurus_arguments()])


def build_image(settings: ServerSettings) -> modal.Image:
    """The image, what changes least first.

    CUDA's compiler is in it because FlashInfer 0.2.0 compiles kernels: PyPI has its source only. A
    compiled wheel in its own index is taken when there is one for this torch.
    """
    image = (
        modal.Image.from_registry("nvidia/cuda:12.4.1-devel-ubuntu22.04", add_python=PYTHON)
        .entrypoint([])  # the base image's prints a licence at every start
        .apt_install("build-essential", "git")
        .uv_pip_install(*PACKAGES, extra_options=f"--exclude-newer {AS_OF}", uv_version=UV)
        .uv_pip_install(
            FLASHINFER,
            extra_index_url=settings.flashinfer_index,
            extra_options="--no-deps --index-strategy unsafe-best-match",
            uv_version=UV,
        )
        .run_commands(
            download_command(settings),
            secrets=[modal.Secret.from_name(settings.hf_secret, required_keys=["HF_TOKEN"])],
        )
        .uv_pip_install(
            f"tokasaurus @ git+{settings.tokasaurus_repository}@{settings.tokasaurus_commit}",
            extra_options="--no-deps",  # they are all above
            uv_version=UV,
        )
    )
    if not settings.allow_remote_cartridges:
        image = image.env({"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"})
    if settings.warm_build:
        image = image.add_local_file(HERE / "warm_up.py", "/opt/warm_up.py", copy=True)
        image = image.run_commands(warm_up_command(settings), gpu=settings.gpu)
    # The gateway starts `python -m cartridge_distill...` as a process of its own. A .pth file makes
    # the package importable there whatever the working directory and PYTHONPATH are.
    pth = "import site; print(site.getsitepackages()[0])"
    image = image.run_commands(f'echo {IN_IMAGE} > "$(python -c {shlex.quote(pth)})/cartridge.pth"')
    for package in ("verl_patches", "cartridge_distill"):
        image = image.add_local_dir(
            PROJECT / package, f"{IN_IMAGE}/{package}", copy=True, ignore=["**/__pycache__/**"]
        )
    if settings.defence == "repair":
        # A Tokasaurus that the repairs are not for ends the deployment, not the first run.
        image = image.run_commands(REPAIR)
    return image.add_local_file(
        HERE / "deploy_settings.py", f"{BESIDE_THIS_FILE}/deploy_settings.py"
    )


class CommitUploads:
    """ASGI middleware: commits the Volume before an upload is answered.

    What a container writes to a Volume, its successor sees after a commit. Modal commits in the
    background every few seconds and once when a container ends, so that only a container that is
    killed loses anything; with this, not even that loses a version the trainer was told is there.
    Modal refuses a commit while a file on the Volume is open. The upload is answered all the same
    then, and the background commit follows.
    """

    def __init__(self, app: Any, commit: Callable[[], Awaitable[None]]) -> None:
        self.app = app
        self.commit = commit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "PUT":
            await self.app(scope, receive, send)
            return

        async def commit_first(message: Any) -> None:
            if message["type"] == "http.response.start" and message["status"] < 300:
                try:
                    await self.commit()
                except (RuntimeError, modal.exception.Error) as error:
                    logger.warning(
                        "%s: the Volume could not be committed now (%s); the background commit "
                        "follows",
                        scope["path"],
                        error,
                    )
            await send(message)

        await self.app(scope, receive, commit_first)


settings = ServerSettings.from_environment()
app = modal.App(settings.app_name)
cartridges = modal.Volume.from_name(settings.volume, create_if_missing=True)
secrets = [modal.Secret.from_name(settings.gateway_secret, required_keys=["TOKASAURUS_API_KEY"])]
if settings.allow_remote_cartridges:
    secrets.append(modal.Secret.from_name(settings.hf_secret, required_keys=["HF_TOKEN"]))


@app.function(
    image=build_image(settings),
    gpu=settings.gpu,
    cpu=settings.cpu,
    memory=settings.memory_mib,
    env=settings.as_environment(),  # this file is imported again in the container
    secrets=secrets,
    volumes={str(CARTRIDGES): cartridges},
    min_containers=settings.min_containers,
    max_containers=settings.max_containers,
    scaledown_window=settings.scaledown_window_s,
    timeout=settings.request_timeout_s,
    startup_timeout=settings.startup_timeout_s + CONTAINER_START_S,
)
@modal.concurrent(max_inputs=settings.max_inflight + settings.max_uploads + SPARE_REQUESTS)
@modal.asgi_app(requires_proxy_auth=settings.proxy_auth)
def serve() -> FastAPI:
    """The gateway, in the container; the process it starts is Tokasaurus."""
    from cartridge_distill.gateway.app import create_app
    from cartridge_distill.gateway.settings import token_from_environment
    from cartridge_distill.util.known_hosts import KnownHosts, OnlyKnownHosts

    gateway = settings.gateway(weights_folder(settings), CARTRIDGES)
    served = create_app(gateway, token=token_from_environment())
    if settings.allow_hosts:  # Modal names the app; with the token one name is as good as another
        served.add_middleware(OnlyKnownHosts, hosts=KnownHosts(more=settings.allow_hosts))
    if settings.commit_uploads:
        served.add_middleware(CommitUploads, commit=cartridges.commit.aio)
    return served
