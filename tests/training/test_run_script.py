"""training/run_cartridge_distill.sh: what it refuses, and that its command makes a good run."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from cartridge_distill.server.running import BackgroundServer
from tests.gateway.rig import TOKEN, Rig
from tests.training.conftest import ROOT, child_environment
from tests.training.rows import write_rows
from verl_patches.config.checks import check_run_config
from verl_patches.trainer.run_folder import TRACKER

SCRIPT = ROOT / "training" / "run_cartridge_distill.sh"


def run_script(
    *arguments: str, verl: Path | None = None, cwd: Path = ROOT, **extra: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=child_environment(verl, **{"PYTHON": sys.executable, **extra}),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder)
    return folder


def test_help_names_every_variable() -> None:
    done = run_script("--help")
    assert done.returncode == 0
    source = SCRIPT.read_text()
    for name in ("TOKASAURUS_URL", "SYNC_DIR", "MODEL", "DATA", "TOKENS", "LR", "PLATFORM", "OUT"):
        assert name in done.stdout and f"${{{name}" in source
    assert "set -euo" not in done.stdout


def test_it_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_refuses_without_a_url_and_says_how_to_get_a_server(patched: Path) -> None:
    done = run_script(verl=patched)
    assert done.returncode == 2
    assert "TOKASAURUS_URL is not set" in done.stderr
    assert " serve --model meta-llama/Llama-3.2-3B-Instruct --host 0.0.0.0" in done.stderr
    assert "modal deploy modal/modal_tokasaurus.py" in done.stderr


def test_refuses_a_server_that_is_not_there(patched: Path, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    done = run_script(verl=patched, TOKASAURUS_URL=url, SYNC_DIR=str(tmp_path), WAIT="0.5")
    assert done.returncode == 2
    assert f"no inference server at {url}" in done.stderr
    assert "how to get a server" in done.stderr


def test_refuses_an_unpatched_verl(pristine: Path) -> None:
    done = run_script(verl=pristine, TOKASAURUS_URL="http://127.0.0.1:1")
    assert done.returncode == 2
    assert "not applied" in done.stderr
    assert "-m verl_patches apply" in done.stderr


def test_refuses_when_new_versions_have_no_way_to_the_server(
    patched: Path, server: BackgroundServer
) -> None:
    done = run_script(verl=patched, TOKASAURUS_URL=server.url)
    assert done.returncode == 2 and "takes no uploads: it is a bare server" in done.stderr
    assert "cartridge_distill.gateway" in done.stderr and "SYNC_DIR" in done.stderr
    done = run_script(verl=patched, TOKASAURUS_URL=server.url, SYNC_DIR="/no/such/place")
    assert done.returncode == 2 and "--sync-dir /no/such/place" in done.stderr


def test_a_gateway_needs_its_token_and_no_directory(patched: Path, rig: Rig, data: Path) -> None:
    done = run_script(verl=patched, TOKASAURUS_URL=rig.url, DRY_RUN="1", DATA=str(data))
    assert done.returncode == 2 and "set TOKASAURUS_API_KEY" in done.stderr
    done = run_script(
        verl=patched,
        TOKASAURUS_URL=rig.url,
        TOKASAURUS_API_KEY=TOKEN,
        SERVED_MODEL="tiny",
        DRY_RUN="1",
        DATA=str(data),
    )
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()[-1]
    assert "cartridge.transport=http" in command and "sync_base_model=tiny" in command
    assert "sync_dir" not in command
    assert TOKEN not in done.stdout + done.stderr
    write_rows(data, train=8)
    done = run_script(
        verl=patched,
        TOKASAURUS_URL=rig.url,
        TOKASAURUS_API_KEY=TOKEN,
        DRY_RUN="1",
        DATA=str(data),
    )
    assert done.returncode == 2 and "8 rows, data.train_batch_size=32" in done.stderr


def test_its_command_is_a_configuration_that_can_train(
    patched: Path, server: BackgroundServer, data: Path, tmp_path: Path
) -> None:
    done = run_script(
        "actor_rollout_ref.actor.cartridge.topk=50",
        verl=patched,
        cwd=tmp_path,  # relative paths are the caller's
        TOKASAURUS_URL=server.url,
        SYNC_DIR="cartridges",
        DATA="data",
        PLATFORM="cpu",
        DRY_RUN="1",
    )
    assert done.returncode == 0, done.stderr
    assert "serves tiny" in done.stdout
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command[1:3] == ["-m", "verl.trainer.main_ppo"]
    overrides = command[command.index("--config-name") + 2 :]
    folder = command[command.index("--config-path") + 1]
    search = f"hydra.searchpath=[file://{patched / 'verl/trainer/config'}]"
    GlobalHydra.instance().clear()
    with initialize_config_dir(folder, version_base=None):
        config = compose("cartridge_distill", overrides=[*overrides, search])
    check_run_config(config)
    assert config.actor_rollout_ref.rollout.custom.tokasaurus_url == server.url
    assert config.actor_rollout_ref.rollout.temperature == 0.7
    cartridge = config.actor_rollout_ref.actor.cartridge
    assert (cartridge.num_tokens, cartridge.lr, cartridge.topk) == (2048, 0.02, 50)
    assert cartridge.documents == str(data / "documents.jsonl")
    assert cartridge.sync_dir == str(tmp_path / "cartridges")
    assert cartridge.run_name == "data"


def test_a_run_that_was_killed_says_how_it_goes_on(
    patched: Path, model_folder: Path, server: BackgroundServer, data: Path, tmp_path: Path
) -> None:
    # The training alone dies, as it does without memory.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'verl.trainer.main_ppo' in sys.orig_argv:\n"
        "    print('RuntimeError: planted', flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    saved = tmp_path / "out" / "checkpoints" / TRACKER
    saved.parent.mkdir(parents=True)
    saved.write_text("12")
    done = run_script(
        *("data.max_prompt_length=128", "data.max_response_length=8"),
        "ray_kwargs.ray_init.num_cpus=8",
        verl=patched,
        MODEL=str(model_folder),
        TOKENS="16",
        TOKASAURUS_URL=server.url,
        SYNC_DIR=str(tmp_path / "cartridges"),
        DATA=str(data),
        OUT=str(tmp_path / "out"),
        PLATFORM="cpu",
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(patched), str(ROOT)]),
    )
    assert done.returncode == 128 + 9
    assert "cause: RuntimeError: planted" in done.stderr
    assert "error: the run ended with status 137; step 12 is saved; the same command" in done.stderr


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"PATIENTS": "patient_01 patient_02"},
            "--data longhealth --patients patient_01 patient_02 --recipe",
        ),
        ({"SOURCE": "handbook"}, "--data handbook --recipe"),
    ],
)
def test_data_that_is_not_there_is_prepared(
    patched: Path, server: BackgroundServer, tmp_path: Path, settings: dict[str, str], says: str
) -> None:
    done = run_script(
        verl=patched,
        TOKASAURUS_URL=server.url,
        SYNC_DIR=str(tmp_path / "cartridges"),
        DATA=str(tmp_path / "new"),
        DRY_RUN="1",
        **settings,
    )
    assert done.returncode == 0, done.stderr
    [said] = [line for line in done.stdout.splitlines() if "prepare_data.py" in line]
    assert says in said


def test_a_typo_in_data_trains_on_no_other_document(
    patched: Path, server: BackgroundServer, tmp_path: Path
) -> None:
    done = run_script(
        verl=patched,
        TOKASAURUS_URL=server.url,
        SYNC_DIR=str(tmp_path / "cartridges"),
        DATA=str(tmp_path / "handbok"),
    )
    assert done.returncode == 2 and "no prepared data there; fix: name the folder" in done.stderr
    assert not (tmp_path / "handbok").exists()
