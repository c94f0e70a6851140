"""Recipe, curve and last numbers on their way into a saved cartridge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, read_cartridge, save_cartridge
from tests.tiny import random_cartridge, tiny_model
from verl_patches.trainer.history import History
from verl_patches.trainer.training_record import add_training_record

CONFIG: DictConfig = OmegaConf.create(
    {
        "data": {"train_batch_size": 4, "seed": 0, "train_files": "/home/somebody/train.parquet"},
        "actor_rollout_ref": {"rollout": {"n": 1, "temperature": 0.7}},
        "trainer": {"total_training_steps": 9},
    }
)


def metrics(step: int) -> dict[str, Any]:
    return {"actor/loss": 1 / step, "actor/grad_norm": 0.5, "actor/lr": 0.02, "other": "words"}


def test_it_is_in_the_cartridge(tmp_path: Path) -> None:
    folder = tmp_path / "global_step_2" / "actor" / "cartridge"
    meta = CartridgeMeta("tiny", step=2, recipe={"cartridge.lr": 0.02})
    save_cartridge(random_cartridge(tiny_model()), folder, meta)
    history = History()
    for step in (1, 2):
        history.add(step, f"run-step-{step - 1:06d}", metrics(step))
    add_training_record(tmp_path / "global_step_2", CONFIG, history.lines)
    told = read_cartridge(folder).meta
    assert told.recipe == {
        "cartridge.lr": 0.02,
        "data.train_batch_size": 4,
        "data.seed": 0,
        "rollout.n": 1,
        "rollout.temperature": 0.7,
        "trainer.total_training_steps": 9,
    }
    assert told.metrics == {
        "curve": [
            {"step": 1, "loss": 1.0, "grad_norm": 0.5},
            {"step": 2, "loss": 0.5, "grad_norm": 0.5},
        ],
        "last_step": {"step": 2, "loss": 0.5, "grad_norm": 0.5, "lr": 0.02},
    }


@pytest.mark.parametrize(("ahead", "told"), [(0, None), (2, 2)])
def test_rollouts_ahead_are_told_of_where_there_were_any(
    tmp_path: Path, ahead: int, told: int | None
) -> None:
    folder = tmp_path / "actor" / "cartridge"
    save_cartridge(random_cartridge(tiny_model()), folder, CartridgeMeta("tiny", step=1))
    config = OmegaConf.merge(
        CONFIG, {"actor_rollout_ref": {"actor": {"cartridge": {"async_steps": ahead}}}}
    )
    add_training_record(tmp_path, config, [])  # type: ignore[arg-type]
    recipe = read_cartridge(folder).meta.recipe
    assert recipe is not None and recipe.get("cartridge.async_steps") == told
