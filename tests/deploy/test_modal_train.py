"""The training's deployment: image, GPU, secrets, Volume, retries, and what it runs inside."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from train_plan import Interrupted

import modal
from cartridge_distill.util.errors import ConfigError
from tests.deploy.recording import FOLDER, IN_CONTAINER, PROJECT, Recorded, load


@pytest.fixture(scope="module")
def loaded() -> tuple[ModuleType, Recorded]:
    """The file with default settings."""
    return load("modal_train")


@pytest.fixture(scope="module")
def recorded(loaded: tuple[ModuleType, Recorded]) -> Recorded:
    return loaded[1]


@pytest.fixture
def module(loaded: tuple[ModuleType, Recorded]) -> ModuleType:
    return loaded[0]


# ---- image


def test_image_is_made_as_make_setup_makes_its_environment(recorded: Recorded) -> None:
    assert [call.name for call in recorded.image[:4]] == [
        "debian_slim",
        "apt_install",
        "add_local_file",
        "run_commands",
    ]
    assert recorded.image[0].kwargs == {"python_version": "3.11"}
    assert "git" in recorded.image[1].args  # git apply patches veRL
    lock = recorded.image[2]
    assert lock.args[0] == PROJECT / "requirements" / "lock.txt"
    assert lock.kwargs["copy"] is True
    torch, rest = recorded.image[3].args
    assert rest == f"pip install --no-deps -r {lock.args[1]}"
    finds = (
        torch.removeprefix('pip install "')
        .removesuffix('"')
        .replace(lock.args[1], str(lock.args[0]))
    )
    printed = subprocess.run(
        ["bash", "-c", f'echo "{finds}"'], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert printed.startswith("torch==") and len(printed.split()) == 1


def test_verl_is_patched_in_the_image(recorded: Recorded, module: ModuleType) -> None:
    copied = {call.args[1] for call in recorded.of("add_local_dir") if call.kwargs["copy"]}
    assert copied == {
        f"{module.IN_IMAGE}/{name}" for name in ("cartridge_distill", "verl_patches", "training")
    }
    install, patch = recorded.of("run_commands")[-1].args
    assert install == f"pip install --no-deps --no-build-isolation -e {module.IN_IMAGE}"
    assert patch == "python -m verl_patches apply"
    for call in recorded.of("add_local_dir", "add_local_file"):
        assert Path(call.args[0]).exists(), call.args[0]


def test_models_are_downloaded_once(recorded: Recorded, module: ModuleType) -> None:
    assert recorded.one("env").args[0]["HF_HOME"].startswith(str(module.STORE))


# ---- the function


def test_gpu_time_and_retries(recorded: Recorded) -> None:
    options = recorded.one("function").kwargs
    assert options["gpu"] == "A100-80GB"
    assert options["timeout"] == 24 * 3600
    assert options["single_use_containers"] is True
    assert isinstance(options["retries"], modal.Retries)
    assert options["retries"].max_retries == 8


def test_runs_are_on_a_volume(recorded: Recorded) -> None:
    [(path, volume)] = recorded.one("function").kwargs["volumes"].items()
    assert path == "/training"
    assert recorded.volume(volume).args == ("cartridge-training",)
    assert recorded.volume(volume).kwargs["create_if_missing"] is True


def names_of_secrets(recorded: Recorded) -> dict[str, list[str]]:
    return dict(recorded.secret(secret) for secret in recorded.one("function").kwargs["secrets"])


def test_secrets_are_named_with_their_keys(recorded: Recorded) -> None:
    assert names_of_secrets(recorded) == {
        "huggingface-secret": ["HF_TOKEN"],
        "cartridge-gateway-secret": ["TOKASAURUS_API_KEY"],
        "cartridge-proxy-secret": ["MODAL_PROXY_KEY", "MODAL_PROXY_SECRET"],
    }


def test_proxy_secret_can_be_left_out_and_wandb_added() -> None:
    given = {"CARTRIDGE_TRAIN_PROXY_SECRET": "none", "CARTRIDGE_TRAIN_WANDB_SECRET": "wandb"}
    _, recorded = load("modal_train", given)
    assert names_of_secrets(recorded) == {
        "huggingface-secret": ["HF_TOKEN"],
        "cartridge-gateway-secret": ["TOKASAURUS_API_KEY"],
        "wandb": ["WANDB_API_KEY"],
    }


def test_credentials_have_the_names_the_client_reads() -> None:
    from cartridge_distill.rollout.http import auth_headers

    headers = auth_headers(
        {"TOKASAURUS_API_KEY": "a", "MODAL_PROXY_KEY": "b", "MODAL_PROXY_SECRET": "c"}
    )
    assert headers == {"Authorization": "Bearer a", "Modal-Key": "b", "Modal-Secret": "c"}


def test_settings_reach_the_container(tmp_path: Path) -> None:
    """Modal imports the file again in the container, where neither project nor variables are."""
    given = {"CARTRIDGE_TRAIN_GPU": "H100", "CARTRIDGE_TRAIN_PROXY_SECRET": "none"}
    here, recorded = load("modal_train", given)
    root = tmp_path / "root"
    root.mkdir()
    for file in ("modal_train.py", "deploy_settings.py", "train_plan.py"):
        shutil.copy(FOLDER / file, root)
    there, _ = load("modal_train", recorded.one("function").kwargs["env"], folder=root)
    assert there.settings == here.settings
    mounted = {call.args[1] for call in recorded.of("add_local_file")}
    assert {f"{IN_CONTAINER}/deploy_settings.py", f"{IN_CONTAINER}/train_plan.py"} <= mounted


def test_bad_settings_end_it_at_once() -> None:
    with pytest.raises(ConfigError, match="CARTRIDGE_TRAIN_TIMEOUT_H=yes"):
        load("modal_train", {"CARTRIDGE_TRAIN_TIMEOUT_H": "yes"})


# ---- what runs in the container


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, Path]:
    """The function's file with a folder in the place of the image, and one for the Volume."""
    module, _ = load("modal_train", {"CARTRIDGE_TRAIN_WANDB_SECRET": "wandb"})
    script = tmp_path / "image" / "training" / "run_cartridge_distill.sh"
    script.parent.mkdir(parents=True)
    script.write_text('env > "$OUT/environment"; printf "%s\\n" "$@" > "$OUT/arguments"; exit 5\n')
    monkeypatch.setattr(module, "IN_IMAGE", str(tmp_path / "image"))
    monkeypatch.setattr(module, "STORE", tmp_path / "store")
    monkeypatch.setenv("SYNC_DIR", "/stale")
    return module, tmp_path


def test_the_same_script_runs_inside(container: tuple[ModuleType, Path]) -> None:
    module, folder = container
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*executing locally.*")  # no Volume here
        code, message = module.train.local(
            url="https://server",
            name="mine",
            data="longhealth",
            steps=30,
            save_every=5,
            overrides=["actor_rollout_ref.actor.cartridge.topk=50"],
            script_settings={"MODEL": "some/model", "ROWS": ""},
        )
    assert code == 5 and "saved nothing new" in message
    out = folder / "store" / "runs" / "mine"
    environment = dict(
        line.split("=", 1) for line in (out / "environment").read_text().splitlines() if "=" in line
    )
    assert environment["TOKASAURUS_URL"] == "https://server"
    assert environment["DATA"] == str(folder / "store" / "data" / "longhealth")
    assert environment["OUT"] == str(out)
    assert environment["MODEL"] == "some/model"
    assert environment["PYTHON"] == sys.executable
    assert "SYNC_DIR" not in environment and "ROWS" not in environment
    arguments = (out / "arguments").read_text().split()
    assert "actor_rollout_ref.actor.cartridge.topk=50" in arguments
    assert "trainer.save_freq=5" in arguments
    assert "trainer.logger=[console,file,wandb]" in arguments


def test_modal_tries_again_what_had_moved_on(
    container: tuple[ModuleType, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = container

    def moved_on(*arguments: Any) -> tuple[int, str]:
        assert isinstance(arguments[-1], dict)
        raise Interrupted("the training ended with code 1 after step 20 of 30")

    monkeypatch.setattr(module, "run_attempt", moved_on)
    with warnings.catch_warnings(), pytest.raises(Interrupted):
        warnings.filterwarnings("ignore", message=".*executing locally.*")
        module.train.local("https://server", "mine", "data", 30, 5, [], {})


# ---- the command line


class Remote:
    """Stands in for Modal's cloud: what would be sent there."""

    def __init__(self, answer: tuple[int, str]) -> None:
        self.answer = answer
        self.sent: list[tuple[Any, ...]] = []

    def remote(self, *arguments: Any) -> tuple[int, str]:
        self.sent.append(arguments)
        return self.answer


def test_command_line_reaches_the_function(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remote = Remote((0, "done"))
    monkeypatch.setattr(module, "train", remote)
    module.main("https://server", name="mine", steps=64, rows=512, args="a.b=1 'c.d=[x, y]'")
    [(url, name, data, steps, save_every, overrides, settings)] = remote.sent
    assert (url, name, data, steps, save_every) == ("https://server", "mine", "longhealth", 64, 10)
    assert overrides == ["a.b=1", "c.d=[x, y]"]
    assert settings == {"MODEL": "", "SOURCE": "", "PATIENTS": "", "ROWS": "512"}
    printed = capsys.readouterr().out
    assert "done" in printed
    assert "modal volume get cartridge-training runs/mine" in printed


def test_failure_is_the_exit_code(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "train", Remote((2, "refused: no server")))
    with pytest.raises(SystemExit) as ended:
        module.main("https://server")
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"url": "server.modal.run"}, "--url server.modal.run"),
        ({"name": "../other"}, "--name ../other"),
        ({"data": "a/b"}, "--data a/b"),
        ({"steps": 0}, "--steps 0"),
        ({"save_every": 0}, "--save-every 0"),
        ({"rows": -1}, "--rows -1"),
    ],
)
def test_nonsense_is_refused_before_a_machine_is_rented(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], says: str
) -> None:
    remote = Remote((0, "done"))
    monkeypatch.setattr(module, "train", remote)
    with pytest.raises(SystemExit, match=says):
        module.main(**{"url": "https://server", **given})
    assert not remote.sent


def test_modals_own_command_line_knows_the_options() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "modal", "run", "modal/modal_train.py", "--help"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for option in ("--url", "--name", "--steps INTEGER", "--save-every INTEGER", "--args"):
        assert option in done.stdout
