"""``distill --rebuild RUN``: a cartridge of documents that changed goes on from the old one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, read_meta, save_cartridge
from cartridge_distill.util.errors import CartridgeFormatError, ConfigError
from cartridge_distill.util.processes import Supervisor
from tests.pipeline.conftest import SMALL, Typed
from tests.tiny import random_cartridge, tiny_model
from verl_patches.pipeline import checks, stages
from verl_patches.pipeline.settings import Distillation, as_run

ACTOR = "actor_rollout_ref.actor.cartridge"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A run that ended: a cartridge of 32 tokens, and its data."""
    run = tmp_path / "old"
    meta = CartridgeMeta(base_model="tiny", step=1)
    save_cartridge(random_cartridge(tiny_model(), 32), run / "cartridge", meta)
    (run / "metrics.jsonl").touch()
    return run


def wanted(tmp_path: Path, model: Path, old: Path, **changes: Any) -> Distillation:
    given = {"documents": "notes.md", "model": str(model), "out": tmp_path / "new", "tokens": 32}
    return Distillation(**{**given, "rebuild": str(old), **changes})


def test_the_training_begins_with_the_old_cartridge(
    tmp_path: Path, model_folder: Path, old: Path
) -> None:
    run = as_run(wanted(tmp_path, model_folder, old))
    assert f"{ACTOR}.init=checkpoint" in run.overrides
    assert f"{ACTOR}.checkpoint_path={old}/cartridge" in run.overrides
    checks.check_model(wanted(tmp_path, model_folder, old))
    with pytest.raises(
        ConfigError, match="has 32 tokens, and --tokens is 48; fix: give --tokens 32"
    ):
        checks.check_model(wanted(tmp_path, model_folder, old, tokens=48))


def test_two_beginnings_are_refused(tmp_path: Path, model_folder: Path, old: Path) -> None:
    with pytest.raises(ConfigError, match="begins with that run's cartridge, and .*init=random"):
        wanted(tmp_path, model_folder, old, overrides=(f"{ACTOR}.init=random",))


def test_a_run_without_a_cartridge_is_refused(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "metrics.jsonl").touch()
    with pytest.raises(CartridgeFormatError, match="is a run without a cartridge yet"):
        wanted(tmp_path, model_folder, tmp_path / "half")


def test_data_and_evaluation_are_told(
    tmp_path: Path, model_folder: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(stages, "run_stage", lambda command, *_: asked.append(list(command)) or "")
    monkeypatch.setattr(stages, "Stage", lambda command, *_: asked.append(list(command)))
    settings = wanted(tmp_path, model_folder, old)
    with Supervisor() as supervisor:
        stages.start_data(settings, tmp_path, supervisor)
        stages.evaluate(settings, supervisor)
    data, evaluation = (" ".join(command) for command in asked)
    assert f"--rebuild {old}" in data
    assert f"--untrained {old}/cartridge" in evaluation  # what it began with


@pytest.mark.long
@pytest.mark.integration
@pytest.mark.timeout(1500)
def test_a_document_that_changed(
    typed: Typed,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    """Two whole runs: the second begins where the first ended, and asks about what is new."""
    keys, lamp = "The harbour master keeps the keys.", "The lamp was built by Marten Holt."
    text = f"# Keys\n\n{keys} He opens at nine.\n\n# Lamp\n\n{lamp}\n"
    document = tmp_path / "notes.md"
    document.write_text(text)
    words = ["distill", document, "--model", model_folder, *SMALL]
    first = typed(*words, "--out", "runs/first")
    assert first.returncode == 0, first.stdout + first.stderr
    document.write_text(text.replace("Marten Holt", "Ada Brandt"))
    second = typed(*words, "--out", "runs/second", "--rebuild", "runs/first")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "Sections that changed: 1, others: 1" in second.stdout
    runs = tmp_path / "runs"
    recipe = json.loads((runs / "second" / "recipe.json").read_text())
    assert any(f"checkpoint_path={runs}/first/cartridge" in each for each in recipe["overrides"])
    kl = [
        {
            row["condition"]: row["metrics"]["prompt_kl"]["mean"]
            for row in json.loads((runs / name / "evaluation/evaluation.json").read_text())[
                "conditions"
            ]
        }
        for name in ("first", "second")
    ]
    assert kl[1]["untrained cartridge"] != kl[0]["untrained cartridge"]
    assert read_meta(runs / "second" / "cartridge")["recipe"]["cartridge.init"] == "checkpoint"
    assert re.search("2 versions served|3 versions served", second.stdout), second.stdout
