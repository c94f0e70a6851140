"""A whole run that was stopped, gone on with by two ranks: the losses of the run that was not.

Both draw the same samples: the embedded server's sampling follows from its seed, the prompt and the
version's step.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from cartridge_distill.cartridge.checkpoint import load_cartridge, read_meta
from cartridge_distill.sync.versions import new_run_id, run_of, step_of, version_id
from tests.gateway.rig import TOKEN, Rig, upload_bytes
from tests.verl.world import OVER_HTTP, STEPS, World, as_it_was_after
from verl_patches.rollout.run_ids import RUNS_FILE
from verl_patches.trainer.run_folder import TRACKER

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

TOTAL, STOPPED = STEPS + 1, 2  # the last step is in the data's second pass


SETTINGS = [
    "actor_rollout_ref.actor.cartridge.init=random",
    "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=1",
    f"trainer.total_training_steps={TOTAL}",
    "trainer.total_epochs=2",
    "trainer.save_freq=1",
]


def stopped_and_gone_on_with(world: World, *settings: str, ranks: int) -> None:
    """A whole run, and one that goes on from where it stood: the same numbers at every step."""
    status, log = world.run(*SETTINGS, *settings)
    assert status == 0, log[-4000:]
    whole = {int(step["training/global_step"]): step for step in world.metrics}
    assert sorted(whole) == list(range(1, TOTAL + 1))
    run = world.folder / "checkpoints"
    assert sorted(f.name for f in run.glob("global_step_*")) == [
        f"global_step_{n}"
        for n in range(TOTAL - 2, TOTAL + 1)  # the last three stay
    ]
    stopped = as_it_was_after(run, STOPPED, world.folder / "stopped")
    (world.folder / "metrics.jsonl").unlink()
    status, log = world.run(
        *SETTINGS,
        *settings,
        f"trainer.default_local_dir={stopped}",
        f"trainer.n_gpus_per_node={ranks}",
    )
    assert status == 0, log[-4000:]
    assert f"resumed from {stopped}/global_step_{STOPPED}, step {STOPPED} of {TOTAL}" in log
    resumed = {int(step["training/global_step"]): step for step in world.metrics}
    # the log was gone: the steps before have the numbers that were saved with them
    assert sorted(resumed) == list(range(1, TOTAL + 1))
    for number, step in resumed.items():
        for what in ("actor/loss", "actor/grad_norm", "actor/lr"):
            assert step[what] == pytest.approx(whole[number][what], rel=1e-5), (number, what)
        if number > STOPPED:
            assert step["prompt_length/mean"] == whole[number]["prompt_length/mean"]
    assert (stopped / TRACKER).read_text() == str(TOTAL)
    told = [read_meta(f / f"global_step_{TOTAL}" / "actor" / "cartridge") for f in (run, stopped)]
    assert told[0]["recipe"] == told[1]["recipe"]
    curves = [[row["loss"] for row in each["metrics"]["curve"]] for each in told]
    assert len(curves[0]) == TOTAL and curves[1] == pytest.approx(curves[0], rel=1e-4)
    first, last = (
        load_cartridge(ended / f"global_step_{TOTAL}" / "actor" / "cartridge").state_dict()
        for ended in (run, stopped)
    )
    for name, tensor in first.items():
        torch.testing.assert_close(last[name], tensor, atol=1e-5, rtol=1e-4)


def starts(world: World) -> tuple[str, str]:
    """The ids under which the run was started, the first and the second time."""
    first, second = (world.folder / "stopped" / RUNS_FILE).read_text().split()
    return first, second


@pytest.mark.long
def test_a_run_that_was_stopped_goes_on_with_two_ranks(world: World) -> None:
    other = world.folder / "cartridges" / version_id(new_run_id("run"), 1)
    other.mkdir(parents=True)  # of somebody else's run, under the same name
    stopped_and_gone_on_with(world, ranks=2)
    first, second = starts(world)
    # a server never loads an id twice: the numbers go on under a new name
    versions = [version for version in world.loaded() if run_of(version) == second]
    assert [step_of(version) for version in versions] == list(range(STOPPED, TOTAL + 1))
    assert {run_of(version) for version in world.loaded()} == {first, second}
    # what the first start left is gone
    there = sorted(folder.name for folder in (world.folder / "cartridges").iterdir())
    kept = [version_id(second, step) for step in (TOTAL - 1, TOTAL)]
    assert there == sorted([other.name, *kept])


@pytest.mark.long
def test_a_run_over_http_that_was_stopped_goes_on(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOKASAURUS_API_KEY", TOKEN)
    other = version_id(new_run_id("run"), 1)
    with Rig(world.folder / "rig", world.folder / "model") as rig:
        assert rig.put(other, upload_bytes()).status_code == 201
        url = f"actor_rollout_ref.rollout.custom.tokasaurus_url={rig.url}"
        stopped_and_gone_on_with(world, *OVER_HTTP, url, ranks=1)
        _, second = starts(world)
        kept = [version_id(second, step) for step in (TOTAL - 1, TOTAL)]
        assert rig.on_disk() == sorted([other, *kept])
