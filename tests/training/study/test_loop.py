"""The parts of a run: its order, its rows, its log, and what is refused."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.distill.mixing import STUDENT, TEACHER
from cartridge_distill.model.loading import load_model
from cartridge_distill.model.reading import read_tokenizer
from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.util.errors import CartridgeFormatError, ConfigError, OffPolicyError
from tests.training.study.made import write_model
from training.study.earlier import Earlier
from training.study.loop import (
    PlainLoop,
    batches,
    keep_lines,
    log_line,
    samples_of,
    split,
    totals_of,
)
from training.study.rollouts import Prompt, Rollouts, Written
from training.study.settings import CartridgeSettings, RunSettings


def test_each_pass_is_shuffled_anew_and_has_whole_batches_alone() -> None:
    order = list(islice(batches(10, 3, seed=5), 6))
    for start in (0, 3):
        one_pass = [place for batch in order[start : start + 3] for place in batch]
        assert len(set(one_pass)) == 9  # the tenth is left out
    assert order[:3] != order[3:]
    assert order == list(islice(batches(10, 3, seed=5), 6)) != list(islice(batches(10, 3, 6), 6))
    with pytest.raises(ConfigError, match="2 prompts are less than one batch of 3"):
        next(batches(2, 3, seed=0))


def written(lengths: list[tuple[int, int]]) -> list[Written]:
    """Rollouts of (prompt, answer) tokens; the second is the teacher's."""
    found = []
    for number, (prompt, answer) in enumerate(lengths):
        ids = list(range(10, 10 + prompt))
        said = Completion(list(range(50, 50 + answer)), [-0.5 - number] * answer, "length")
        author, step = (TEACHER, None) if number == 1 else (STUDENT, 7)
        found.append(Written(Prompt(number, ids, "d"), said, author, step))
    return found


@pytest.mark.parametrize(("row_tokens", "parts"), [(100, [4]), (12, [2, 1, 1]), (1, [1, 1, 1, 1])])
def test_a_batch_is_cut_into_rows_and_nothing_is_lost(row_tokens: int, parts: list[int]) -> None:
    samples = samples_of(written([(3, 2), (4, 3), (5, 4), (9, 1)]), 0.7)
    assert (samples.answers, samples.authors.count(TEACHER)) == ([2, 3, 4, 1], 1)
    cut = list(split(samples, row_tokens))
    assert [len(part.sequences) for part in cut] == parts
    assert torch.equal(torch.cat([p.rollout_logprobs for p in cut]), samples.rollout_logprobs)
    masks = [mask for part in cut for mask in part.response_masks]
    assert all(np.array_equal(a, b) for a, b in zip(masks, samples.response_masks, strict=True))
    assert [s for part in cut for s in part.steps] == [7, None, 7, 7]


def test_lines_after_the_save_and_half_a_line_are_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert keep_lines(path, 0) == [] and totals_of([])["trained"] == 0
    for step in (1, 2, 3):
        log_line(path, step, {"tokens/total_trained": 10.0 * step})
    with path.open("a") as file:
        file.write('{"step": 4, "da')  # the process died
    kept = keep_lines(path, 2)
    assert [line["step"] for line in kept] == [1, 2] and totals_of(kept)["trained"] == 20
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and the data of six prompts."""
    import pandas as pd

    folder = tmp_path_factory.mktemp("loop")
    write_model(folder)
    rows = [{"index": n, "document_id": "d"} for n in range(6)]
    prompts = [[{"role": "user", "content": "Who?" * (1 + n % 3)}] for n in range(6)]
    pd.DataFrame({"prompt": prompts, "extra_info": rows}).to_parquet(folder / "train.parquet")
    text = "The harbour master keeps the keys. " * 3
    (folder / "documents.jsonl").write_text(json.dumps({"document_id": "d", "text": text}))
    return folder


def loop_of(world: Path, async_steps: int = 0, **changes: Any) -> PlainLoop:
    model = world / "model"
    cartridge = CartridgeSettings(num_tokens=16, async_steps=async_steps)
    settings = RunSettings(cartridge, batch=3, response_tokens=4, **changes)
    tokenizer = read_tokenizer(str(model))
    return PlainLoop(load_model(model), tokenizer, str(model), world, settings)


def test_a_batch_in_several_rows_gives_the_step_of_one(world: Path) -> None:
    one, several = loop_of(world), loop_of(world, row_tokens=20)
    for _ in range(2):
        mine, other = one.train_step(), several.train_step()
        assert other["actor/loss"] == pytest.approx(mine["actor/loss"], abs=1e-6)
        assert other["actor/grad_norm"] == pytest.approx(mine["actor/grad_norm"], rel=1e-4)
        for name in ("tokens/total_trained", "actor/trained_tokens/document"):
            assert other[name] == mine[name] > 0


def test_answers_of_an_older_version_end_the_run(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = loop_of(world)
    first = loop.cartridge.prefix().to(torch.device("cpu"))
    loop.train_step()
    real = Rollouts.write

    def stale(self: Rollouts, prompts: Any, plan: Any, epoch: int, step: int, _: Any) -> Any:
        return real(self, prompts, plan, epoch, step, first)

    monkeypatch.setattr(Rollouts, "write", stale)
    with pytest.raises(OffPolicyError, match="disagree on a chosen token's log-prob"):
        for _ in range(8):  # one step of the rate may move too little to be seen
            loop.train_step()


def writers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Versions that write, in order, from now on."""
    found: list[int] = []
    real = Rollouts.write

    def noted(self: Rollouts, prompts: Any, plan: Any, epoch: int, step: int, prefix: Any) -> Any:
        found.append(step)
        return real(self, prompts, plan, epoch, step, prefix)

    monkeypatch.setattr(Rollouts, "write", noted)
    return found


def test_rollouts_are_as_old_as_async_steps_lets_them_be(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = writers(monkeypatch)
    strict, ahead = loop_of(world), loop_of(world, 2)
    at_once = [strict.train_step()["actor/loss"] for _ in range(4)]
    stale = [ahead.train_step() for _ in range(4)]
    assert versions == [0, 1, 2, 3, 0, 0, 0, 1]
    assert [numbers["training/staleness"] for numbers in stale] == [0, 1, 2, 2]
    assert stale[0]["actor/loss"] == at_once[0]  # by the initial cartridge, both
    assert stale[3]["actor/loss"] != at_once[3]
    assert all("actor/logprob_diff/max" in numbers for numbers in stale)  # and held against it


def test_a_version_under_anothers_number_ends_the_run(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = loop_of(world, 1)

    def wrong(self: Earlier, version: int, cartridge: TrainableCache) -> Any:
        return max(0, version - 1), cartridge  # the newest writes, and the one before it is named

    monkeypatch.setattr(Earlier, "writes", wrong)
    with pytest.raises(OffPolicyError, match="disagree on a chosen token's log-prob"):
        for _ in range(8):
            loop.train_step()


def test_a_run_that_is_behind_goes_on_exactly(world: Path, tmp_path: Path) -> None:
    whole = loop_of(world, 2)
    losses = [whole.train_step()["actor/loss"] for _ in range(6)]
    stopped, state = loop_of(world, 2), tmp_path / "run" / "state"
    for _ in range(3):
        stopped.train_step()
        stopped.save(state)
    assert sorted(place.name for place in (tmp_path / "run/earlier").iterdir()) == [
        "000001",
        "000002",
    ]
    again = loop_of(world, 2)
    again.restore(state, totals_of([]))
    assert [again.train_step()["actor/loss"] for _ in range(3)] == losses[3:]
    (tmp_path / "run/earlier/000001").rename(tmp_path / "gone")
    with pytest.raises(CartridgeFormatError, match="earlier/000001 is not there"):
        loop_of(world, 2).restore(state, totals_of([]))


def test_a_model_of_another_precision_is_refused(world: Path) -> None:
    model = world / "model"
    settings = RunSettings(CartridgeSettings(num_tokens=16), batch=3)
    with pytest.raises(ConfigError, match="float32, and the model is torch.bfloat16"):
        PlainLoop(
            *(load_model(model, torch.bfloat16), read_tokenizer(str(model)), str(model)),
            *(world, settings),
        )
