"""What `pip install` of the wheel brings: commands that work in an empty folder, without extras."""

from __future__ import annotations

import json
import subprocess
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, load_cartridge, save_cartridge
from cartridge_distill.util.extras import NEEDED
from tests.cli.commands import COMMANDS, PASSED_ON
from tests.tiny import random_cartridge, tiny_model
from tests.training.conftest import ROOT
from tests.wheel.conftest import Installed

pytestmark = pytest.mark.integration
EXTRAS = sorted({name for extras in NEEDED.values() for names in extras.values() for name in names})
GO_ON = {
    "train": "verl_patches.launch",
    "demo": "verl_patches.demo",
    "distill": "verl_patches.distill",
}
# transformers reads about these itself where they are there; the core never does.
LIGHT = [*EXTRAS, "peft", "datasets", "accelerate", "tensordict", "hydra", "omegaconf"]


def test_the_package_is_the_wheels_and_has_its_data(installed: Installed, wheel: Path) -> None:
    script = (
        "import cartridge_distill, verl_patches\n"
        "from cartridge_distill.data.command import DEFAULT_DATA\n"
        "from verl_patches.launching.settings import CONFIG_FOLDER\n"
        "from verl_patches.manage import patch_files\n"
        "from verl_patches.packages import TOKASAURUS\n"
        "print(cartridge_distill.__file__, verl_patches.__file__, DEFAULT_DATA, CONFIG_FOLDER)\n"
        "print(len(patch_files()), len(patch_files(TOKASAURUS)))"
    )
    done = installed.python(script)
    assert done.returncode == 0, done.stderr
    paths, patches = done.stdout.splitlines()
    for path in map(Path, paths.split()):
        assert path.is_relative_to(installed.folder) and path.exists()
    of_verl = len(list((ROOT / "verl_patches").rglob("*.patch")))
    assert patches == f"{of_verl} 1" and of_verl > 0
    for name in ("demo.json", "clinic.json"):
        assert (installed.folder / "cartridge_distill/data/examples" / name).is_file()
    for name in ("cartridge_distill.yaml", "platform/cpu.yaml", "platform/cuda.yaml"):
        assert (installed.folder / "verl_patches/config" / name).is_file()
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("tests", "training", "benchmarks"))]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_the_command_is_there(installed: Installed) -> None:
    done = subprocess.run(
        [installed.folder / "bin" / "cartridge-distill", "--help"],
        env=installed.environment(),
        cwd=installed.work,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


def test_help_needs_no_extra(installed: Installed) -> None:
    """All in one process, but for the two that go on as another module."""
    script = (
        "import json\n"
        "from typer.testing import CliRunner\n"
        "from cartridge_distill.cli.main import app\n"
        f"names = {[name for name in COMMANDS if name not in GO_ON]!r}\n"
        "done = {name: CliRunner().invoke(app, [name, '--help']) for name in names}\n"
        "print(json.dumps({name: [one.exit_code, one.output] for name, one in done.items()}))\n"
    )
    done = installed.python(script, without=LIGHT)
    assert done.returncode == 0, done.stderr
    for command, (status, shown) in json.loads(done.stdout).items():
        assert status == 0 and "sage: " in shown, (command, shown)
        assert PASSED_ON.get(command, command) in shown


@pytest.mark.parametrize("command", GO_ON)
def test_help_of_what_goes_on_as_another_module(installed: Installed, command: str) -> None:
    script = f"import runpy, sys; sys.argv = ['x', '--help']; runpy.run_module({GO_ON[command]!r}, "
    done = installed.python(script + "run_name='__main__')", without=LIGHT)
    assert done.returncode == 0, done.stderr
    assert (
        f"usage: cartridge-distill {command}" in done.stdout and PASSED_ON[command] in done.stdout
    )


def test_a_cartridge_is_described_and_converted(installed: Installed, tmp_path: Path) -> None:
    meta = CartridgeMeta(base_model="someone/tiny")
    cartridge = save_cartridge(random_cartridge(tiny_model()), tmp_path / "mine", meta)
    shown = installed.run("info", cartridge, without=LIGHT)
    assert shown.returncode == 0 and "someone/tiny" in shown.stdout, shown.stderr
    done = installed.run("convert", cartridge, "there", "--to", "peft", without=LIGHT)
    assert done.returncode == 0, done.stderr
    back = load_cartridge(installed.work / "there")
    assert back.num_tokens == load_cartridge(cartridge).num_tokens


def test_the_chat_apis_modules_need_no_extra(installed: Installed) -> None:
    rooms = ("util", "cartridge", "rollout", "sync", "server", "cli")
    script = (
        "import importlib, pkgutil, cartridge_distill as top\n"
        f"rooms = {rooms!r}\n"
        "for found in pkgutil.walk_packages(top.__path__, 'cartridge_distill.'):\n"
        "    if found.name.split('.')[1] in rooms and not found.name.endswith('__main__'):\n"
        "        importlib.import_module(found.name)\n"
        "print('all')\n"
    )
    done = installed.python(script, without=LIGHT)
    assert done.returncode == 0 and done.stdout.endswith("all\n"), done.stderr


def test_doctor_says_what_training_needs(installed: Installed) -> None:
    done = installed.run("doctor")
    assert done.returncode == 0, done.stdout
    for words in ("ok  torch", "ok  verl: 0.9.1", "ok  ray", "ok  plotly", "ok  veRL's patches"):
        assert words in done.stdout


def test_data_are_prepared(installed: Installed, model_folder: Path) -> None:
    made = ("--out", "data/demo", "--rows", 12, "--val-rows", 2, "--teacher-context", 4000)
    done = installed.run("prepare", "--tokenizer", model_folder, *made)
    assert done.returncode == 0, done.stderr
    assert "Wrote 12 training and 2 validation prompts to data/demo" in done.stdout
    assert (installed.work / "data" / "demo" / "train.parquet").is_file()
    told = done.stdout.split("next:")[1]
    assert f"serve --model {model_folder}" in told and "train --model" in told
    assert "--data data/demo --server http://127.0.0.1:10210" in told


@pytest.mark.parametrize(
    ("command", "missing", "extras"),
    [
        ("train", "verl", "train"),
        ("prepare", "pypdf", "data"),
        ("eval", "bm25s", "data"),
        ("report", "plotly", "report"),
        ("serve", "prometheus_client", "gateway"),
        ("demo", "pandas", "train,data,report"),
    ],
)
def test_a_command_says_which_extra_is_missing(
    installed: Installed, command: str, missing: str, extras: str
) -> None:
    typed = {"report": ["report", "runs/none"], "serve": ["serve", "--model", "m"]}
    done = installed.run(*typed.get(command, [command]), without=[missing])
    assert done.returncode == 1
    said = f"`cartridge-distill {command}` needs {missing}, not installed here: "
    assert f"{said}pip install 'cartridge-distill[{extras}]'" in done.stderr
    assert "Traceback" not in done.stderr


def _project() -> dict[str, list[Requirement]]:
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = {"": described["dependencies"], **described["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in listed.items()}


def test_each_module_that_a_command_asks_for_is_of_the_extra_that_it_names() -> None:
    homes = packages_distributions()
    listed = {
        extra: {canonicalize_name(one.name) for one in lines} for extra, lines in _project().items()
    }
    for command, extras in NEEDED.items():
        for extra, modules in extras.items():
            for module in modules:
                of = {canonicalize_name(name) for name in homes[module]}
                assert of & listed[extra], f"{command}: [{extra}] does not bring {module}"
                assert not of & listed[""], f"{command}: {module} is of the core"
