"""The line that goes on from a finished run: the run's own settings, from its cartridge."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from verl_patches import distill
from verl_patches.pipeline.more_steps import more_steps, next_folder
from verl_patches.pipeline.settings import INIT, Distillation


def settings(**changes: Any) -> Distillation:
    given = {
        "documents": "handbook",
        "name": "handbook",
        "model": "owner/model",
        "out": Path("runs/mine").absolute(),
    }
    return Distillation(**{**given, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tokens": 32, "lr": 0.5, "prompt_recipe": "open", "questions": "q.csv", "save_every": 2},
        {"threads": 1, "server": "http://box:1", "log_to": "wandb", "test_every": 0, "seed": 3},
        {"name": "Mine"},
        {"overrides": (f"+{INIT}=random", f"++{INIT}_document=a")},
        {"overrides": (f"{INIT}=random", f"{INIT}_document=a", "data.shuffle=False")},
    ],
)
def test_it_is_the_same_run_from_its_cartridge(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "handbook").mkdir()
    (tmp_path / "handbook" / "a.txt").write_text("The harbour master keeps the keys.")
    (tmp_path / "q.csv").write_text("question,answer\nWho keeps the keys?,the harbour master\n")
    before = settings(**changes)
    command, *words = more_steps(before)
    options = distill.parse(words)
    again = distill.settings_of(options)
    assert command == "distill" and again.out == Path("runs/mine-2").absolute()
    for field in fields(Distillation):
        if field.name not in ("out", "overrides"):
            assert getattr(again, field.name) == getattr(before, field.name), field.name
    cartridge = Path("runs/mine/cartridge").absolute()
    begin = "actor_rollout_ref.actor.cartridge"
    kept = [said for said in before.overrides if not said.lstrip("+").startswith(INIT)]
    said = [f"{begin}.init=checkpoint", f"{begin}.checkpoint_path={cartridge}"]
    assert list(again.overrides) == [*kept, *said]
    assert again.begins_elsewhere


def test_a_folder_that_is_there_is_not_named(tmp_path: Path) -> None:
    (tmp_path / "run-2").mkdir()
    assert next_folder(tmp_path / "run") == tmp_path / "run-3"
