"""A plain loop gives the losses of a veRL run: with the engine alone, and with a whole run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from cartridge_distill.model.loading import load_model
from cartridge_distill.model.reading import read_tokenizer
from tests.verl.conftest import build, group, world  # noqa: F401  (fixtures)
from tests.verl.engine_rig import SHAPES, loss_of, rollouts, step
from tests.verl.world import CARTRIDGE, ROWS, STEPS, World
from training.study.loop import PlainLoop
from training.study.settings import CartridgeSettings, OptimSettings, RunSettings
from verl_patches.actor.samples import Samples

TOTAL = STEPS + 1  # the last step is in the data's second pass


def loop_of(model: Path, data: Path, settings: RunSettings) -> PlainLoop:
    return PlainLoop(load_model(model), read_tokenizer(str(model)), str(model), data, settings)


def test_the_settings_have_verls_names_and_defaults() -> None:
    from verl.workers.config import CartridgeConfig, FSDPOptimizerConfig

    theirs = CartridgeConfig()
    for name, value in vars(CartridgeSettings()).items():
        assert getattr(theirs, name) == value, name
    optim = FSDPOptimizerConfig(lr=1.0)
    own = {"lr_warmup_steps", "clip_grad", "weight_decay", "zero_indexed_step"}
    for name, value in vars(OptimSettings()).items():
        if name not in own:  # a run's own config sets these
            assert getattr(optim, name) == value, name


@pytest.mark.parametrize("recipe", [{}, {"loss": "kl_mix", "skip_first_tokens": 1}])
def test_the_engine_and_the_loop_take_the_same_steps(
    build: Callable[..., Any],  # noqa: F811
    model_folder: Path,
    tmp_path: Path,
    recipe: dict[str, Any],
) -> None:
    engine = build(**recipe)
    info = [{"index": n, "document_id": "red"} for n in range(len(SHAPES))]
    frame = pd.DataFrame({"prompt": [[{"role": "user", "content": "?"}]] * 4, "extra_info": info})
    frame.to_parquet(tmp_path / "train.parquet")
    cartridge = CartridgeSettings(num_tokens=32, init_document="red", **recipe)
    loop = loop_of(model_folder, tmp_path, RunSettings(cartridge, batch=4))
    for number in range(3):
        data = rollouts(engine, seed=number, by_teacher=[1], micro_batch=4)
        samples = Samples.from_micro_batch(data, "document_id")
        theirs = step(engine, data)
        mine = loop._update(samples)
        assert mine["loss"] == pytest.approx(loss_of(theirs), abs=1e-6)
        assert mine["loss"] > 0.01
        assert mine["grad_norm"] == pytest.approx(theirs["metrics"]["grad_norm"], rel=1e-5)
    for name, tensor in engine.cartridge.state_dict().items():
        torch.testing.assert_close(loop.cartridge.state_dict()[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.long
@pytest.mark.integration
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("fraction", "async_steps"), [([[1, 0.0], [4, 1.0]], 0), (1.0, 1)], ids=["strict", "ahead"]
)
def test_a_whole_run_and_the_loop_have_the_same_losses(
    world: World,  # noqa: F811
    fraction: Any,
    async_steps: int,
) -> None:
    """Server, HTTP, Ray and veRL on the one side; a loop on the other."""
    actor = "actor_rollout_ref.actor"
    status, log = world.run(
        f"{actor}.cartridge.init=random",
        f"{actor}.cartridge.on_policy_fraction={str(fraction).replace(' ', '')}",
        f"{actor}.cartridge.async_steps={async_steps}",
        f"{actor}.cartridge.lr_decay_to=0.1",
        f"{actor}.optim.lr_warmup_steps=1",
        f"trainer.total_training_steps={TOTAL}",
        "trainer.total_epochs=2",
    )
    assert status == 0, log[-4000:]
    cartridge = CartridgeSettings(
        num_tokens=CARTRIDGE,
        init="random",
        on_policy_fraction=fraction,
        async_steps=async_steps,
        lr_decay_to=0.1,
    )
    settings = RunSettings(
        cartridge,
        OptimSettings(lr_warmup_steps=1),
        steps=TOTAL,
        batch=ROWS,
        response_tokens=8,
    )
    data = world.folder / "alone"
    data.mkdir()
    for name in ("train.parquet", "documents.jsonl"):
        shutil.copy(world.folder / name, data)
    loop = loop_of(world.folder / "model", data, settings)
    for theirs in world.metrics:
        mine = loop.train_step()
        for name in ("tokens/total_generated", "tokens/total_generated_by_teacher"):
            assert mine[name] == theirs[name], name
        assert mine["actor/loss"] == pytest.approx(theirs["actor/loss"], abs=1e-6)
        assert mine["actor/grad_norm"] == pytest.approx(theirs["actor/grad_norm"], rel=1e-5)
        assert mine["actor/loss"] > 0.01
