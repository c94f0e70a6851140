"""A run's folder in a cartridge's place: what is meant, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cartridge_distill.cartridge.checkpoint import (
    CartridgeMeta,
    convert,
    read_cartridge,
    save_cartridge,
)
from cartridge_distill.cartridge.run_folder import is_run, model_of, resolve_cartridge
from cartridge_distill.util.errors import CartridgeFormatError
from tests.tiny import random_cartridge, tiny_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has begun and saved nothing."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps({"model": "someone/base"}))
    return folder


def save(folder: Path) -> Path:
    return save_cartridge(
        random_cartridge(tiny_model()), folder, CartridgeMeta(base_model="someone/tiny", step=3)
    )


def test_a_run_stands_for_its_best_cartridge(run: Path) -> None:
    best = save(run / "cartridge")
    assert is_run(run) and not is_run(best)
    assert resolve_cartridge(run) == str(best)
    assert resolve_cartridge(str(run)) == str(best)
    assert read_cartridge(resolve_cartridge(run)).meta.step == 3


def test_what_is_no_run_stays_as_it_is(tmp_path: Path) -> None:
    made = save(tmp_path / "made")
    (made / "metrics.jsonl").touch()  # whatever else lies beside it
    (tmp_path / "plain").mkdir()
    for source in (made, tmp_path / "plain", tmp_path / "none", "owner/name", "owner/name@abc"):
        assert resolve_cartridge(source) == str(source)


def test_a_run_without_a_cartridge_is_refused_with_what_to_do(run: Path) -> None:
    with pytest.raises(CartridgeFormatError, match="no step was saved so far; fix: start"):
        resolve_cartridge(run)
    step = run / "checkpoints" / "global_step_7"
    save(step / "actor" / "cartridge")
    (step / "data.pt").touch()
    with pytest.raises(CartridgeFormatError, match=r"step 7: .*global_step_7/actor/cartridge"):
        resolve_cartridge(run)


def test_the_model_is_the_runs_or_the_cartridges_own(run: Path, tmp_path: Path) -> None:
    assert model_of(run) == "someone/base"
    best = save(run / "cartridge")
    assert model_of(best) == model_of(best / "cartridge.safetensors") == "someone/tiny"
    (run / "recipe.json").write_text("{}")
    assert model_of(run) == "someone/tiny"
    for kind in ("peft", "tokasaurus"):
        made = convert(best, tmp_path / kind, kind, base_model="other/base")  # type: ignore[arg-type]
        assert model_of(made) == "other/base"
    made = convert(best, tmp_path / "made.pt", "hazyresearch")
    assert model_of(made) is None and model_of("owner/name") is None


def test_a_broken_recipe_is_named(run: Path) -> None:
    (run / "recipe.json").write_text("{")
    with pytest.raises(CartridgeFormatError, match="recipe.json"):
        model_of(run)
