"""The light core where nothing else is installed: the wheel and what it asks for, from an index.

``test_light_core`` hides the extras' packages; here they are not there.
"""

from __future__ import annotations

import os
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, load_cartridge, save_cartridge
from cartridge_distill.util.extras import NEEDED
from tests.cli.commands import COMMANDS
from tests.tiny import random_cartridge, tiny_model
from tests.training.conftest import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(1200)]
TYPED = {
    "prepare": ("--tokenizer", "m", "--out", "o"),
    "report": ("runs/none",),
    "serve": ("--model", "m"),
    "doctor --data": ("somewhere",),
    "init --document": ("file.txt", "--model", "m", "o"),
    "chat --document": ("file.txt",),
}


@dataclass(frozen=True)
class Light:
    """The environment's folder, and an empty working directory."""

    folder: Path
    work: Path

    def run(self, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """One of the environment's programs."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        return subprocess.run(
            [str(self.folder / "bin" / program), *map(str, arguments)],
            env={**inherited, "COLUMNS": "200", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            cwd=self.work,
            capture_output=True,
            text=True,
            timeout=600,
        )


@pytest.fixture(scope="module")
def light(package_index: None, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Light:
    found = Light(tmp_path_factory.mktemp("light") / "env", tmp_path_factory.mktemp("empty"))
    venv.create(found.folder, with_pip=True)
    lock = (ROOT / "requirements" / "lock.txt").read_text().splitlines()
    [torch] = [line for line in lock if line.startswith("torch==")]
    for asked in (torch, wheel):
        done = found.run("pip", "install", "--quiet", "--no-compile", asked)
        assert done.returncode == 0, done.stderr
    return found


def test_no_package_of_an_extra_is_there(light: Light) -> None:
    modules = {name for extras in NEEDED.values() for names in extras.values() for name in names}
    script = (
        "import sys; from importlib.util import find_spec\nprint(*filter(find_spec, sys.argv[1:]))"
    )
    done = light.run("python", "-c", script, *modules)
    assert done.returncode == 0 and done.stdout.split() == [], done.stdout + done.stderr


def test_help_names_all_commands(light: Light) -> None:
    done = light.run("cartridge-distill", "--help")
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


def test_a_cartridge_is_described_converted_and_asked(
    light: Light, model_folder: Path, tmp_path: Path
) -> None:
    meta = CartridgeMeta(base_model="someone/tiny")
    cartridge = save_cartridge(random_cartridge(tiny_model()), tmp_path / "mine", meta)
    shown = light.run("cartridge-distill", "info", cartridge)
    assert shown.returncode == 0 and "someone/tiny" in shown.stdout, shown.stderr
    done = light.run("cartridge-distill", "convert", cartridge, "there", "--to", "peft")
    assert done.returncode == 0, done.stderr
    assert load_cartridge(light.work / "there").num_tokens == 16
    described = light.run("cartridge-distill", "chat", "--help")
    assert described.returncode == 0 and "--start" in described.stdout, described.stderr
    asked = ("--prompt", "Who?", "--max-new-tokens", 4)
    said = light.run(
        "cartridge-distill", "chat", "--model", model_folder, "--cartridge", cartridge, *asked
    )
    assert said.returncode == 0, said.stderr


@pytest.mark.parametrize("command", NEEDED)
def test_a_command_names_all_that_it_lacks(light: Light, command: str) -> None:
    done = light.run("cartridge-distill", *command.split(), *TYPED.get(command, ()))
    modules = dict.fromkeys(name for names in NEEDED[command].values() for name in names)
    said = f"`cartridge-distill {command}` needs {', '.join(modules)}, not installed here: "
    fix = f"pip install 'cartridge-distill[{','.join(NEEDED[command])}]'"
    assert said + fix in done.stdout + done.stderr  # doctor has a line of its own for it
    assert done.returncode == 1 and "Traceback" not in done.stderr
