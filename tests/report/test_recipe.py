"""recipe.json holds what repeats a run, and no secret."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from cartridge_distill.report.recipe import (
    HIDDEN,
    Recipe,
    commit,
    seed_of,
    without_secrets,
    write_recipe,
)
from tests.training.conftest import ROOT


def test_what_it_holds(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path / "mine",
        ["bash", "training/run_cartridge_distill.sh", "trainer.nnodes=2"],
        ["data.seed=3"],
        3,
        model="owner/name",
        environment={"MODEL": "owner/name", "TOKENS": "128"},
    )
    recipe = Recipe.model_validate_json(path.read_text())
    assert (recipe.name, recipe.seed, recipe.model) == ("mine", 3, "owner/name")
    assert recipe.environment == {"MODEL": "owner/name", "TOKENS": "128"}
    assert {"python", "torch", "transformers", "verl", "ray"} <= set(recipe.versions)


def test_the_commit_is_the_checkouts() -> None:
    done = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    found = commit()
    if done.returncode:  # a copy without its history
        assert found is None
    else:
        assert found is not None and found.commit == done.stdout.strip()


@pytest.mark.parametrize(
    "variable",
    ["TOKASAURUS_API_KEY", "HF_TOKEN", "MODAL_PROXY_SECRET", "WANDB_API_KEY", "PASSWORD"],
)
def test_variables_called_like_secrets_are_not_there(tmp_path: Path, variable: str) -> None:
    path = write_recipe(tmp_path, ["x"], [], 0, environment={variable: "hush", "LR": "0.1"})
    assert "hush" not in path.read_text() and variable not in path.read_text()
    assert json.loads(path.read_text())["environment"] == {"LR": "0.1"}


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["a.url=https://anna:hush@host:1/x"], ["a.url=https://host:1/x"]),
        (["a.url=https://anna:hu,sh@host/x?sig=hush&b=c#hush"], ["a.url=https://host/x"]),
        (
            ["urls=[http://one:1,http://anna:hush@two:2]"],
            ["urls=[http://one:1,http://two:2]"],
        ),
        (["--api-key", "hush", "--steps", "3"], ["--api-key", HIDDEN, "--steps", "3"]),
        (["--token=hush"], [f"--token={HIDDEN}"]),
        (["+trainer.wandb_api_key=hush"], [f"+trainer.wandb_api_key={HIDDEN}"]),
        (["server.password=hush"], [f"server.password={HIDDEN}"]),
        (
            ["a.num_tokens=128", "data.prompt_key=prompt"],
            ["a.num_tokens=128", "data.prompt_key=prompt"],
        ),
    ],
)
def test_commands_lose_their_secrets(given: list[str], shown: list[str]) -> None:
    assert without_secrets(given) == shown


def test_seeds_folders_and_servers_are_no_part_of_the_identity(tmp_path: Path) -> None:
    def identity(folder: str, seed: int, lr: float) -> tuple[str, ...]:
        out = tmp_path / folder
        overrides = [f"data.seed={seed}", f"a.dir={out}/x", f"a.url=http://h:{seed}", f"a.lr={lr}"]
        path = write_recipe(out, ["x"], overrides, seed, name="demo")
        return Recipe.model_validate_json(path.read_text()).identity()

    assert identity("one", 0, 0.1) == identity("two", 1, 0.1)
    assert identity("one", 0, 0.1) != identity("two", 1, 0.2)


def test_the_last_seed_counts() -> None:
    assert seed_of(["data.seed=3", "a.b=1", "data.seed=4"]) == 4
    assert seed_of(["a.b=1"]) == 0


def test_the_process_environment_is_not_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "SOMETHING", "private")
    assert "private" not in write_recipe(tmp_path, ["x"], [], 0).read_text()


def test_a_command_with_a_name_that_is_no_text_is_written(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, ["distill", os.fsdecode(b"b\xffad.txt")], [], 0)
    recipe = Recipe.model_validate(json.loads(path.read_text("utf-8")))
    assert recipe.command == ["distill", "b\\xffad.txt"]
