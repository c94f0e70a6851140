"""The rollout server's deployment: image, GPU, secrets, Volume, scaling, authentication, app."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import modal
from cartridge_distill.util.errors import ConfigError
from tests.deploy.recording import FOLDER, IMAGE_STEPS, IN_CONTAINER, PROJECT, Recorded, load

TOKEN = "a token that is long enough"


@pytest.fixture(scope="module")
def loaded() -> tuple[ModuleType, Recorded]:
    """The file with default settings."""
    return load("modal_tokasaurus")


@pytest.fixture(scope="module")
def module(loaded: tuple[ModuleType, Recorded]) -> ModuleType:
    return loaded[0]


@pytest.fixture(scope="module")
def recorded(loaded: tuple[ModuleType, Recorded]) -> Recorded:
    return loaded[1]


def commands(recorded: Recorded) -> list[str]:
    return [line for call in recorded.of("run_commands") for line in call.args]


# ---- the package and the folder


def test_modal_is_the_installed_package_and_not_this_folder() -> None:
    assert modal.__file__ is not None
    assert not Path(modal.__file__).is_relative_to(PROJECT / "modal")
    assert callable(modal.App)


def test_the_recording_sees_every_image_step() -> None:
    """Stands in for Modal's builder: a step it does not know would be missing below."""
    elsewhere = {"from_name"}  # of secrets and Volumes
    for file in ("modal_tokasaurus.py", "modal_train.py"):
        for node in ast.walk(ast.parse((FOLDER / file).read_text())):
            if isinstance(node, ast.Attribute) and hasattr(modal.Image, node.attr):
                assert node.attr in {*IMAGE_STEPS, *elsewhere}, node.attr


# ---- image


def test_image_has_cudas_compiler_and_python(recorded: Recorded) -> None:
    first = recorded.image[0]
    assert first.name == "from_registry"
    assert first.args == ("nvidia/cuda:12.4.1-devel-ubuntu22.04",)
    assert first.kwargs == {"add_python": "3.11"}
    assert {"git", "build-essential"} <= set(recorded.one("apt_install").args)


def test_image_has_pinned_packages(recorded: Recorded, module: ModuleType) -> None:
    packages, flashinfer, tokasaurus = recorded.of("uv_pip_install")
    assert {"torch==2.6.0", "transformers==4.53.0"} <= set(packages.args)
    assert all("==" in package for package in packages.args)
    assert not any(package.startswith(("verl", "ray")) for package in packages.args)
    assert flashinfer.args == ("flashinfer-python==0.2.0.post2",)
    assert flashinfer.kwargs["extra_index_url"] == "https://flashinfer.ai/whl/cu124/torch2.6/"
    assert tokasaurus.args == (
        "tokasaurus @ git+https://github.com/ScalingIntelligence/tokasaurus"
        "@845f115f5bc38aee266821a094fba1cd702dafff",
    )
    for call in (packages, flashinfer, tokasaurus):
        assert call.kwargs["uv_version"] == module.UV  # not "latest"
    for call in (flashinfer, tokasaurus):
        assert "--no-deps" in call.kwargs["extra_options"]  # nothing pinned is moved by them


def needed_by(*packages: str) -> set[str]:
    """Other packages that these of ours import, themselves or through more of ours."""
    todo = [file for name in packages for file in (PROJECT / name).glob("*.py")]
    done: set[Path] = set()
    found: set[str] = set()
    while todo:
        file = todo.pop()
        if file in done or not file.is_file():
            continue
        done.add(file)
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                if name.startswith("cartridge_distill"):
                    place = PROJECT.joinpath(*name.split("."))
                    todo += [place.with_suffix(".py"), place / "__init__.py"]
                else:
                    found.add(name.split(".")[0])
    return found - set(sys.stdlib_module_names)


def test_image_has_what_the_gateway_imports(module: ModuleType) -> None:
    distribution = {"yaml": "pyyaml", "prometheus_client": "prometheus-client"}
    distribution |= {"huggingface_hub": "huggingface-hub"}
    brought_along = {"starlette", "anyio", "pydantic_core"}  # by fastapi
    needed = needed_by("cartridge_distill/gateway", "cartridge_distill/engines/tokasaurus")
    assert {"fastapi", "torch", "transformers"} <= needed
    wanted = {distribution.get(name, name) for name in needed - brought_along}
    installed = {package.partition("==")[0] for package in module.PACKAGES}
    assert wanted <= installed, wanted - installed


def test_weights_are_baked_in_with_the_secret(recorded: Recorded) -> None:
    [call] = [call for call in recorded.of("run_commands") if "snapshot_download" in call.args[0]]
    [secret] = call.kwargs["secrets"]
    assert recorded.secret(secret) == ("huggingface-secret", ["HF_TOKEN"])
    others = [other for other in recorded.of("run_commands") if other is not call]
    assert not any(other.kwargs.get("secrets") for other in others)


def test_download_command_survives_the_shell(module: ModuleType, tmp_path: Path) -> None:
    """Runs it in a real shell against a stand-in for the hub's library."""
    (tmp_path / "huggingface_hub.py").write_text(
        "import json\ndef snapshot_download(*a, **k): print(json.dumps([a, k]))\n"
    )
    (tmp_path / "python").symlink_to(sys.executable)
    settings = module.ServerSettings(model="some/model.x", model_revision="v1.0")
    done = subprocess.run(
        ["sh", "-c", module.download_command(settings)],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    [model], options = json.loads(done.stdout)
    assert model == "some/model.x"
    assert options["revision"] == "v1.0"
    assert options["local_dir"] == "/weights/some/model.x"
    assert "*.safetensors" in options["allow_patterns"]


def test_server_is_started_once_while_the_image_is_built(recorded: Recorded) -> None:
    [call] = [call for call in recorded.of("run_commands") if "warm_up.py" in call.args[0]]
    assert call.kwargs["gpu"] == "H100"
    assert "toka model=/weights/meta-llama/Llama-3.2-3B-Instruct port=10210" in call.args[0]
    assert "kv_cache_num_tokens=131072 use_hydragen=F" in call.args[0]
    places = [step.name for step in recorded.image]
    assert "add_local_file" in places[: recorded.image.index(call)]


def test_image_can_be_built_without_a_gpu() -> None:
    _, recorded = load("modal_tokasaurus", {"CARTRIDGE_SERVER_WARM_BUILD": "0"})
    assert not any("warm_up" in command for command in commands(recorded))
    assert not any("gpu" in call.kwargs for call in recorded.image)


def test_our_code_comes_last_and_is_found_by_every_process(
    recorded: Recorded, module: ModuleType
) -> None:
    *_, pth, patches, package, repair, settings = recorded.image
    assert module.IN_IMAGE in pth.args[0]
    for name, call in (("verl_patches", patches), ("cartridge_distill", package)):
        assert call.args == (PROJECT / name, f"{module.IN_IMAGE}/{name}")
        assert call.kwargs["copy"] is True
    assert repair.args == ("python -m verl_patches apply --package tokasaurus",)
    assert settings.args == (FOLDER / "deploy_settings.py", f"{IN_CONTAINER}/deploy_settings.py")
    for call in recorded.of("add_local_dir", "add_local_file"):
        assert Path(call.args[0]).exists(), call.args[0]


def test_another_tokasaurus_is_noticed_while_the_image_is_built() -> None:
    """The command is a real one, and says no where there is none of the known Tokasaurus."""
    module, _ = load("modal_tokasaurus")
    _, *arguments = module.REPAIR.split()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "Tokasaurus is not installed" in done.stderr

    _, other = load("modal_tokasaurus", {"CARTRIDGE_SERVER_DEFENCE": "restart"})
    assert module.REPAIR not in commands(other)  # needs no particular Tokasaurus


def test_pth_command_makes_the_package_importable(
    recorded: Recorded, module: ModuleType, tmp_path: Path
) -> None:
    """Runs the real command in a real, empty environment."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (tmp_path / "code" / "cartridge_distill").mkdir(parents=True)
    (tmp_path / "code" / "cartridge_distill" / "__init__.py").write_text("print('found')\n")
    [command] = [line for line in commands(recorded) if line.startswith("echo")]
    subprocess.run(
        ["sh", "-c", command.replace(module.IN_IMAGE, str(tmp_path / "code"))],
        env={"PATH": f"{tmp_path / 'env' / 'bin'}:{os.environ['PATH']}"},
        check=True,
        timeout=60,
    )
    done = subprocess.run(
        [tmp_path / "env" / "bin" / "python", "-c", "import cartridge_distill"],
        cwd="/",
        env={},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "found\n"


def test_repository_and_commit_can_be_another() -> None:
    _, recorded = load(
        "modal_tokasaurus",
        {
            "CARTRIDGE_SERVER_TOKASAURUS_REPOSITORY": "https://github.com/me/fork",
            "CARTRIDGE_SERVER_TOKASAURUS_COMMIT": "0123abc",
        },
    )
    last = recorded.of("uv_pip_install")[-1]
    assert last.args == ("tokasaurus @ git+https://github.com/me/fork@0123abc",)


def test_server_is_off_the_hub_unless_remote_cartridges_are_allowed() -> None:
    closed, remote = "CARTRIDGE_SERVER_ALLOW_REMOTE_CARTRIDGES", {"HF_HUB_OFFLINE": "1"}
    _, recorded = load("modal_tokasaurus")
    assert recorded.one("env").args[0].items() >= remote.items()
    names = [recorded.secret(secret)[0] for secret in recorded.one("function").kwargs["secrets"]]
    assert names == ["cartridge-gateway-secret"]  # the container has no use for the hub's token

    _, recorded = load("modal_tokasaurus", {closed: "true"})
    assert not recorded.of("env")
    names = [recorded.secret(secret)[0] for secret in recorded.one("function").kwargs["secrets"]]
    assert names == ["cartridge-gateway-secret", "huggingface-secret"]


# ---- the function


def test_app_and_function_have_the_names_that_make_the_url(module: ModuleType) -> None:
    assert module.app.name == "tokasaurus-cartridge-server"
    assert isinstance(module.serve, modal.Function)
    assert repr(module.serve) == "Function(serve)"


def test_one_gpu_one_container_and_scale_to_zero(recorded: Recorded) -> None:
    options = recorded.one("function").kwargs
    assert options["gpu"] == "H100"
    assert (options["min_containers"], options["max_containers"]) == (0, 1)
    assert options["scaledown_window"] == 300


def test_start_up_may_take_longer_than_the_gateway_waits(
    recorded: Recorded, module: ModuleType
) -> None:
    options = recorded.one("function").kwargs
    gateway = module.settings.gateway(Path("/weights"), Path("/cartridges"))
    assert options["startup_timeout"] > gateway.startup_timeout_s >= 600
    assert options["timeout"] >= 600


def test_gateway_and_not_modal_bounds_the_requests(recorded: Recorded, module: ModuleType) -> None:
    inputs = recorded.one("concurrent").kwargs["max_inputs"]
    assert inputs > module.settings.max_inflight + module.settings.max_uploads


def test_proxy_authentication_is_on_unless_turned_off(recorded: Recorded) -> None:
    assert recorded.one("asgi_app").kwargs == {"requires_proxy_auth": True}
    _, other = load("modal_tokasaurus", {"CARTRIDGE_SERVER_PROXY_AUTH": "false"})
    assert other.one("asgi_app").kwargs == {"requires_proxy_auth": False}
    _, keys = other.secret(other.one("function").kwargs["secrets"][0])
    assert keys == ["TOKASAURUS_API_KEY"]  # the bearer token stays


def test_cartridges_are_on_a_volume(recorded: Recorded) -> None:
    [(path, volume)] = recorded.one("function").kwargs["volumes"].items()
    assert path == "/cartridges"
    call = recorded.volume(volume)
    assert call.args == ("cartridge-versions",)
    assert call.kwargs["create_if_missing"] is True


def test_settings_reach_the_container(tmp_path: Path) -> None:
    """Modal imports the file again in the container, where neither project nor variables are."""
    given = {"CARTRIDGE_SERVER_GPU": "L40S", "CARTRIDGE_SERVER_MAX_INFLIGHT": "99"}
    here, recorded = load("modal_tokasaurus", given)
    root = tmp_path / "root"
    root.mkdir()
    for file in ("modal_tokasaurus.py", "deploy_settings.py"):
        shutil.copy(FOLDER / file, root)
    there, _ = load("modal_tokasaurus", recorded.one("function").kwargs["env"], folder=root)
    assert there.settings == here.settings
    assert there.settings.max_inflight == 99


def test_bad_settings_end_the_deployment_at_once() -> None:
    with pytest.raises(ConfigError, match="CARTRIDGE_SERVER_MAX_CONTAINERS=4"):
        load("modal_tokasaurus", {"CARTRIDGE_SERVER_MAX_CONTAINERS": "4"})
