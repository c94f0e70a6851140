"""Batches that are asked for ahead: which, whose turn it is, and where the data stand in a save."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from verl_patches.trainer.ahead import Ahead, staleness_metrics
from verl_patches.trainer.trainer import CartridgeTrainer


def loader() -> StatefulDataLoader:
    """Four batches of two an epoch, shuffled, as veRL makes it."""
    data = list(range(8))
    generator = torch.Generator().manual_seed(3)
    sampler = RandomSampler(data, generator=generator)
    return StatefulDataLoader(data, batch_size=2, sampler=sampler, drop_last=True)


class Data:
    """The data as the trainer walks through them."""

    def __init__(self, position: Any = None) -> None:
        self.loader = loader()
        if position is not None:
            self.loader.load_state_dict(position)
        self._walk: Any = None

    def take(self) -> list[int]:
        if self._walk is None:
            self._walk = iter(self.loader)
        try:
            return list(next(self._walk).tolist())
        except StopIteration:
            self._walk = iter(self.loader)
            return list(next(self._walk).tolist())


def walked(ahead: Ahead, data: Data, step: int) -> list[list[int]]:
    """The batches that are asked for at the beginning of a step."""
    found = []
    for number in ahead.due(step):
        found.append(data.take())
        ahead.asked(number, data.loader.state_dict())
    return found


@pytest.mark.parametrize("async_steps", [0, 1, 2, 5])
@pytest.mark.parametrize("stop", [1, 3, 4, 5, 7])
def test_a_resume_takes_each_batch_once(async_steps: int, stop: int) -> None:
    """Killed after the save of any step, whatever was asked for ahead; two epochs and a half."""
    last = 10
    data = Data()
    expected = [data.take() for _ in range(last)]
    data, ahead = Data(), Ahead(async_steps, 0, last)
    asked: list[list[int]] = []
    for step in range(1, stop + 1):
        asked += walked(ahead, data, step)
        assert asked == expected[: min(step + async_steps, last)]
        position = ahead.position(step)
    resumed, ahead = Data(position), Ahead(async_steps, stop, last)
    asked = []
    for step in range(stop + 1, last + 1):
        asked += walked(ahead, resumed, step)
        ahead.position(step)
    assert asked == expected[stop:]


def test_nothing_is_asked_for_beyond_the_last_step() -> None:
    ahead = Ahead(3, 0, 5)
    assert list(ahead.due(1)) == [1, 2, 3, 4]
    for step in (1, 2, 3, 4):
        ahead.asked(step, {})
    assert list(ahead.due(2)) == [5]
    ahead.asked(5, {})
    assert [list(ahead.due(step)) for step in (3, 4, 5)] == [[], [], []]


def test_a_position_is_noted_in_order_and_forgotten_when_it_is_past() -> None:
    ahead = Ahead(1, 4, 9)
    changing = {"yielded": 5}
    ahead.asked(5, changing)
    changing["yielded"] = 6
    ahead.asked(6, changing)
    with pytest.raises(ValueError, match="step 8 after that of step 6"):
        ahead.asked(8, changing)
    assert ahead.position(5) == {"yielded": 5}
    assert ahead.position(6) == {"yielded": 6}
    with pytest.raises(KeyError):
        ahead.position(5)


def test_the_mean_age_and_the_samples_by_age() -> None:
    assert staleness_metrics({0: 1, 2: 3}, 2) == {
        "training/staleness_mean": 1.5,
        "training/staleness_samples/0": 1,
        "training/staleness_samples/1": 0,
        "training/staleness_samples/2": 3,
    }
    assert staleness_metrics({}, 1)["training/staleness_mean"] == 0.0


def test_prompts_are_labelled_with_the_step_that_they_are_trained_at() -> None:
    """veRL labels them with ``global_steps``, which is another thing while they are asked for."""
    labelled = []
    trainer: Any = SimpleNamespace(
        global_steps=3,
        train_dataloader=SimpleNamespace(state_dict=dict),
        _ahead=Ahead(2, 2, 9),
    )
    trainer._add_batch_to_generate = lambda: labelled.append(trainer.global_steps)
    CartridgeTrainer.prepare_step(trainer)
    assert (labelled, trainer.global_steps) == ([3, 4, 5], 3)
    trainer.global_steps = 4
    CartridgeTrainer.prepare_step(trainer)
    assert (labelled, trainer.global_steps) == ([3, 4, 5, 6], 4)


def test_a_batch_waits_for_its_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step's prompts are done first, and are not taken in the place of this one's."""
    import transfer_queue as tq

    from verl_patches.trainer.replay import StrictReplayBuffer

    status = {"a": "running", "b": "finished"}
    looks = 0

    def queue(*_: object) -> dict[str, object]:
        nonlocal looks
        looks += 1
        if looks == 3:
            status["a"] = "finished"
        prompts = {
            uid: {"is_prompt": True, "status": status[uid], "global_steps": step}
            for uid, step in (("a", 1), ("b", 2))
        }
        return {"train": {**prompts, "b_0_0": {"seq_len": 3}, "a_0_0": {"seq_len": 2}}}

    monkeypatch.setattr(tq, "kv_list", queue)
    monkeypatch.setattr(tq, "kv_clear", lambda keys, partition_id: None)
    buffer = StrictReplayBuffer("sync", {}, 1, "drop", {}, poll_interval=0.0)
    first, _ = buffer.sample(global_steps=1, partition_id="train", batch_size=1)
    second, _ = buffer.sample(global_steps=2, partition_id="train", batch_size=1)
    assert (first.keys, second.keys, looks) == (["a_0_0"], ["b_0_0"], 4)
