"""Training on a rented GPU, with ``training/run_cartridge_distill.sh`` inside.

    modal run --detach modal/modal_train.py --url https://...-serve.modal.run --name mine

The image holds this project with the locked packages and the patched veRL; a Volume holds runs,
data and the model cache. When the machine is taken away, Modal starts the function again, and it
goes on from the run's last checkpoint, see :mod:`train_plan`.
The machine's settings are :class:`deploy_settings.TrainSettings`.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path

from deploy_settings import TrainSettings
from train_plan import command, run_attempt, script_environment

import modal
from cartridge_distill.sync.versions import is_run_name
from cartridge_distill.util.clean_logs import hide_secrets_in_logs
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.secrecy import clean_text
from cartridge_distill.util.server_url import checked_url

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
IN_IMAGE = "/opt/cartridge-distill"
STORE = Path("/training")  # the Volume
BESIDE_THIS_FILE = "/root"  # where Modal puts and imports this file in every container
PYTHON = "3.11"
LOCK = f"{IN_IMAGE}/requirements/lock.txt"


def build_image() -> modal.Image:
    """The image, made as ``make setup`` makes its environment, what changes least first."""
    image = (
        modal.Image.debian_slim(python_version=PYTHON)
        .apt_install("build-essential", "git")  # Triton compiles; git applies the patches
        .add_local_file(PROJECT / "requirements" / "lock.txt", LOCK, copy=True)
        .run_commands(
            f"pip install \"$(grep '^torch==' {LOCK})\"",
            f"pip install --no-deps -r {LOCK}",
        )
    )
    for folder in ("cartridge_distill", "verl_patches", "training"):
        image = image.add_local_dir(
            PROJECT / folder, f"{IN_IMAGE}/{folder}", copy=True, ignore=["**/__pycache__/**"]
        )
    for file in ("pyproject.toml", "README.md"):
        image = image.add_local_file(PROJECT / file, f"{IN_IMAGE}/{file}", copy=True)
    return (
        image.run_commands(
            f"pip install --no-deps --no-build-isolation -e {IN_IMAGE}",
            "python -m verl_patches apply",
        )
        .env({"HF_HOME": str(STORE / "huggingface"), "PYTHONUNBUFFERED": "1"})
        .add_local_file(HERE / "deploy_settings.py", f"{BESIDE_THIS_FILE}/deploy_settings.py")
        .add_local_file(HERE / "train_plan.py", f"{BESIDE_THIS_FILE}/train_plan.py")
    )


def named_secrets(settings: TrainSettings) -> list[modal.Secret]:
    """The secrets, each with the keys it must hold; Modal refuses to start without them."""
    wanted: list[tuple[str | None, list[str]]] = [
        (settings.hf_secret, ["HF_TOKEN"]),
        (settings.gateway_secret, ["TOKASAURUS_API_KEY"]),
        (settings.proxy_secret, ["MODAL_PROXY_KEY", "MODAL_PROXY_SECRET"]),
        (settings.wandb_secret, ["WANDB_API_KEY"]),
    ]
    return [modal.Secret.from_name(name, required_keys=keys) for name, keys in wanted if name]


settings = TrainSettings.from_environment()
app = modal.App(settings.app_name)
store = modal.Volume.from_name(settings.volume, create_if_missing=True)


@app.function(
    image=build_image(),
    gpu=settings.gpu,
    cpu=settings.cpu,
    memory=settings.memory_mib,
    env=settings.as_environment(),  # this file is imported again in the container
    secrets=named_secrets(settings),
    volumes={str(STORE): store},
    timeout=round(settings.timeout_h * 3600),
    startup_timeout=settings.startup_timeout_s,
    retries=modal.Retries(max_retries=settings.max_retries, initial_delay=10.0, max_delay=60.0),
    single_use_containers=True,  # no half-dead Ray of the attempt before
)
def train(
    url: str,
    name: str,
    data: str,
    steps: int,
    save_every: int,
    overrides: list[str],
    script_settings: dict[str, str],
) -> tuple[int, str]:
    """One attempt, in the container. Modal calls it again when it raises or is preempted.

    Args:
        url: the rollout server.
        name: the run's folder on the Volume, below ``runs/``.
        data: the data's folder on the Volume, below ``data/``.
        steps: optimizer steps of the whole run.
        save_every: steps between saved cartridges.
        overrides: Hydra overrides.
        script_settings: further environment variables of the script.

    Returns:
        Exit code and what there is to say, for the person at the other end.
    """
    hide_secrets_in_logs()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if settings.wandb_secret:
        overrides = ["trainer.logger=[console,file,wandb]", *overrides]

    script = Path(IN_IMAGE) / "training" / "run_cartridge_distill.sh"
    run = STORE / "runs" / name
    # What is written needs no commit from here: Modal commits the Volume every few seconds and once
    # more when the container ends.
    environment = script_environment(
        os.environ,
        run,
        url,
        STORE / "data" / data,
        sys.executable,
        settings.wait_s,
        script_settings,
    )
    return run_attempt(command(script, steps, save_every, overrides), run, steps, environment)


@app.local_entrypoint()
def main(
    url: str,
    name: str = "run",
    data: str = "longhealth",
    steps: int = 128,
    save_every: int = 10,
    model: str = "",
    source: str = "",
    patients: str = "",
    rows: int = 0,
    args: str = "",
) -> None:
    """Starts or goes on with a run.

    Args:
        url: the rollout server, as `modal deploy modal/modal_tokasaurus.py` printed it.
        name: name of the run; the same name goes on where it ended.
        data: folder on the Volume below data/; written from source when it is not there.
        steps: optimizer steps of the whole run.
        save_every: steps between saved cartridges; what lies between is lost at a preemption.
        model: base model; must be the server's.
        source, patients, rows: what data is made of, see training/run_cartridge_distill.sh.
        args: Hydra overrides, "a=1 b=2".
    """
    try:
        url = checked_url(url)
    except ConfigError as error:
        shown = "" if "@" in url else f" {clean_text(url)}"
        sys.exit(f"--url{shown}: {error}; give the whole URL, beginning with https://")
    for option, value in (("--name", name), ("--data", data)):
        if not is_run_name(value):
            sys.exit(f"{option} {value}: use letters and digits with single - or _ between them")
    for option, number in (("--steps", steps), ("--save-every", save_every)):
        if number < 1:
            sys.exit(f"{option} {number}: must be at least 1")
    if rows < 0:
        sys.exit(f"--rows {rows}: must be at least 1; leave it out for the script's default")
    script_settings = {
        "MODEL": model,
        "SOURCE": source,
        "PATIENTS": patients,
        "ROWS": str(rows or ""),
    }
    code, message = train.remote(
        url, name, data, steps, save_every, shlex.split(args), script_settings
    )
    print(message)
    print(f"files: modal volume get {settings.volume} runs/{name} runs/")
    if code:
        sys.exit(code)
