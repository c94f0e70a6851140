"""The engine against the plain forward, one sequence at a time."""

from __future__ import annotations

import copy
import random
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.server.engine import Engine
from cartridge_distill.server.layout import RowBuffers, RowPart, ServingBatch
from cartridge_distill.server.rows import EngineError, Row
from cartridge_distill.server.sampling import RequestSeeds, choose
from cartridge_distill.server.settings import ServerSettings
from tests.architectures import LAYERS_DIFFER, build
from tests.server.conftest import EngineOf
from tests.tiny import (
    ARCHITECTURES,
    plain_distributions,
    plain_logprobs,
    random_cartridge,
    tiny_model,
)

TOLERANCE = 1e-5


def prompt(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(256) for _ in range(length)]


def row(ids: list[int], new: int, prefix: Prefix | None, temperature: float = 0.7) -> Row:
    return Row(ids, new, temperature, random.Random(str(ids)), prefix)


def check(
    model: PreTrainedModel, item: Row, result: Completion, temperature: float | None = None
) -> None:
    wanted = plain_logprobs(
        model,
        item.prefix,
        item.prompt_ids,
        result.token_ids,
        item.temperature if temperature is None else temperature,
    )
    assert result.logprobs == pytest.approx(wanted, abs=TOLERANCE, rel=0)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logprobs_equal_the_plain_forward(kind: str, engine_of: EngineOf) -> None:
    """Ragged prompts, length 1 among them, three prefixes and none, rows joining midway."""
    model = tiny_model(kind)
    engine = engine_of(model, prefill_chunk=16, prefill_tokens=48, max_batch=9)
    prefixes = [random_cartridge(model, tokens, tokens).prefix() for tokens in (16, 48, 32)]
    choices: list[Prefix | None] = [*prefixes, None]
    heats = (0.7, 0.0, 1.0, 1.6)
    rows = [
        row(prompt(length, place), 1 + place % 9, choices[place % 4], heats[place % 4])
        for place, length in enumerate([1, 5, 40, 1, 23, 2, 70, 9, 1, 31, 17, 3, 64, 12])
    ]
    futures = [engine.submit(item) for item in rows[:6]]
    futures[1].result(60)  # the others join what is in flight
    futures += [engine.submit(item) for item in rows[6:]]
    for item, future in zip(rows, futures, strict=True):
        result = future.result(60)
        assert len(result.token_ids) == item.max_new_tokens
        assert result.finish_reason == "length"
        check(model, item, result)
    assert engine.stats.largest_batch > 1


@pytest.mark.parametrize("name", LAYERS_DIFFER)
def test_layers_that_differ_and_layers_that_share(name: str, engine_of: EngineOf) -> None:
    """Behind cartridges, bare, and behind a long beginning whose KV the engine makes and keeps."""
    model = build(name)
    engine = engine_of(
        model, prefill_chunk=16, prefix_cache_tokens=4096, prefix_cache_min_tokens=32
    )
    cartridge = TrainableCache.from_random(model.config, 32, std=1.0).prefix()
    common = prompt(50, 99)
    rows = [row(prompt(3 + 20 * n, n), 4, cartridge if n % 2 else None) for n in range(4)]
    rows += [row(common + prompt(5 + n, n), 4, None) for n in range(3)]
    asked = [(list(item.prompt_ids), item.prefix) for item in rows]
    results = [future.result(60) for future in [engine.submit(item) for item in rows]]
    for (ids, prefix), item, result in zip(asked, rows, results, strict=True):
        wanted = plain_logprobs(model, prefix, ids, result.token_ids, item.temperature)
        assert result.logprobs == pytest.approx(wanted, abs=1e-4, rel=0)
    assert engine.stats.shared_tokens >= 50


def test_bfloat16(llama: PreTrainedModel, engine_of: EngineOf) -> None:
    """The model's dtype rules the matmuls; the softmax is float32, so the error is one rounding."""
    half = copy.deepcopy(llama).to(torch.bfloat16)
    engine = engine_of(half)
    prefix = random_cartridge(llama).prefix().to(dtype=torch.bfloat16)
    for item in [row(prompt(3 + 9 * n, n), 4, prefix) for n in range(4)]:
        result = engine.submit(item).result(60)
        wanted = plain_logprobs(half, prefix, item.prompt_ids, result.token_ids, item.temperature)
        assert result.logprobs == pytest.approx(wanted, abs=0.15)


def test_the_bound_on_kv_memory_holds(llama: PreTrainedModel, engine_of: EngineOf) -> None:
    engine = engine_of(llama, max_kv_tokens=64)
    rows = [row(prompt(length, length), 4, None) for length in (9, 100, 12, 13, 40, 8, 8, 8)]
    futures = [engine.submit(item) for item in rows]
    for item, future in zip(rows, futures, strict=True):
        check(llama, item, future.result(60))
    assert engine.stats.largest_batch <= 64 // 11


def test_greedy_takes_the_most_likely_token(llama: PreTrainedModel, engine_of: EngineOf) -> None:
    engine = engine_of(llama)
    prefix = random_cartridge(llama).prefix()
    ids = prompt(11, 0)
    result = engine.submit(row(ids, 6, prefix, temperature=0.0)).result(60)
    distributions = plain_distributions(llama, prefix, ids, result.token_ids)
    assert distributions.argmax(-1).tolist() == result.token_ids


def test_a_row_does_not_depend_on_its_company(llama: PreTrainedModel, engine_of: EngineOf) -> None:
    prefix = random_cartridge(llama).prefix()
    items = [(prompt(3 + 5 * n % 40, n), 8) for n in range(12)]
    alone = engine_of(llama, max_batch=1)
    together = engine_of(llama, max_batch=12)
    first = [alone.submit(row(ids, new, prefix)) for ids, new in items]
    second = [together.submit(row(ids, new, prefix)) for ids, new in reversed(items)]
    assert [f.result(60).token_ids for f in first] == [f.result(60).token_ids for f in second][::-1]
    assert alone.stats.largest_batch == 1


def test_the_cartridge_is_not_copied_per_row(
    llama: PreTrainedModel, engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention reads the very tensors of the store: one group, whatever the number of rows."""
    seen: list[tuple[int, bool]] = []
    build = ServingBatch.__init__

    def spy(self: ServingBatch, *arguments: Any) -> None:
        build(self, *arguments)
        same = all(group.prefix is prefix for group in self.groups)
        seen.append((len(self.groups), same))

    prefix = random_cartridge(llama).prefix()
    engine = engine_of(llama)
    monkeypatch.setattr(ServingBatch, "__init__", spy)
    futures = [engine.submit(row(prompt(4 + n, n), 3, prefix)) for n in range(10)]
    for future in futures:
        future.result(60)
    assert seen and all(entry == (1, True) for entry in seen)


@pytest.mark.parametrize("kind", ["llama", "mistral_window", "gemma2"])
def test_common_beginnings_are_computed_once(kind: str, engine_of: EngineOf) -> None:
    model = tiny_model(kind)
    engine = engine_of(model, prefill_chunk=30)
    prefixes = [random_cartridge(model, 16, seed).prefix() for seed in range(2)]
    stem, question = prompt(20, 0), prompt(15, 1)
    prompts = [stem + question + prompt(n, n) for n in (3, 1, 8)]
    prompts += [stem, stem, stem + question, [*stem[:7], 255], prompt(6, 9)]
    rows = [row(ids, 5, prefix) for prefix in prefixes for ids in prompts]
    for number, item in enumerate(rows):
        item.generator = random.Random(number)
    for item, future in [(item, engine.submit(item)) for item in rows]:
        check(model, item, future.result(60))
    assert engine.stats.shared_tokens > 100
    assert engine.stats.shared_tokens + engine.stats.prompt_tokens == sum(map(len, prompts)) * 2


def test_segments_keep_padding_small(llama: PreTrainedModel) -> None:
    buffers = RowBuffers([(2, 16)], torch.float32, torch.device("cpu"))
    buffers.reserve(4, 4096, 0)
    lengths = [1, 1, 500, 4000]
    parts = [RowPart(slot, 0, length, None) for slot, length in enumerate(lengths)]
    batch = ServingBatch(parts, buffers, query_heads=1)
    padded = sum(s.rows * s.queries * s.keys for s in batch.segments)
    assert padded < 1.5 * sum(length * length for length in lengths)
    assert [s.rows for s in batch.segments] == [2, 1, 1]


def test_end_token_and_stop(llama: PreTrainedModel, engine_of: EngineOf) -> None:
    engine = engine_of(llama)
    ids = prompt(7, 1)
    free = engine.submit(row(ids, 12, None, temperature=0.0)).result(60)
    end = free.token_ids[4]
    first = free.token_ids.index(end)
    item = row(ids, 12, None, temperature=0.0)
    item.end_ids = frozenset([end])
    stopped = engine.submit(item).result(60)
    assert stopped.token_ids == free.token_ids[: first + 1]  # the end token is included
    assert stopped.finish_reason == "stop"
    last = row(ids, first + 1, None, temperature=0.0)
    last.end_ids = frozenset([end])
    assert engine.submit(last).result(60).finish_reason == "length"  # as on the real server


def test_a_cancelled_row_leaves(llama: PreTrainedModel, engine_of: EngineOf) -> None:
    engine = engine_of(llama)
    long = engine.submit(row(prompt(5, 2), 400, None))
    short = engine.submit(row(prompt(5, 3), 2, None))
    short.result(60)
    assert long.cancel()
    check_item = row(prompt(9, 4), 3, None)
    check(llama, check_item, engine.submit(check_item).result(60))
    made = engine.stats.new_tokens
    assert made < 400


def test_a_failed_forward_fails_its_rows_and_no_others(
    llama: PreTrainedModel, engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(llama)
    forward = engine._forward

    def broken(*_: object) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "_forward", broken)
    with pytest.raises(EngineError, match="out of memory") as failure:
        engine.submit(row(prompt(4, 5), 2, None)).result(60)
    assert failure.value.retryable
    monkeypatch.setattr(engine, "_forward", forward)
    item = row(prompt(4, 5), 2, None)
    check(llama, item, engine.submit(item).result(60))


def test_logits_that_are_not_finite_are_an_error(
    llama: PreTrainedModel, engine_of: EngineOf
) -> None:
    engine = engine_of(llama)
    prefix = random_cartridge(llama).prefix()
    values = [value.detach().clone() for value in prefix.values]
    values[0][:] = float("nan")
    poisoned = Prefix([key.detach() for key in prefix.keys], values)
    good = row(prompt(6, 8), 4, prefix)
    futures = [engine.submit(row(prompt(6, 7), 4, poisoned)), engine.submit(good)]
    with pytest.raises(EngineError, match="not finite") as failure:
        futures[0].result(60)
    assert not failure.value.retryable
    check(llama, good, futures[1].result(60))


def test_stop_fails_what_is_in_flight(llama: PreTrainedModel) -> None:
    engine = Engine(copy.deepcopy(llama), ServerSettings())
    engine.start()
    future = engine.submit(row(prompt(5, 2), 450, None))
    engine.stop()
    with pytest.raises(EngineError, match="shutting down"):
        future.result(5)
    with pytest.raises(EngineError, match="shutting down"):
        engine.submit(row([1], 1, None))


# --- sampling ---------------------------------------------------------------------------------


def test_sampled_frequencies_follow_the_tempered_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, float("-inf")]])
    rows, temperature = 20_000, 0.5
    generators = RequestSeeds(0).generators([1], [], rows)
    ids, logprobs = choose(logits.expand(rows, -1), [temperature] * rows, generators)
    wanted = torch.softmax(logits[0] / temperature, -1)
    found = torch.bincount(torch.tensor(ids), minlength=5) / rows
    assert torch.allclose(found, wanted, atol=0.015)
    assert found[4] == 0
    for token, logprob in zip(ids[:50], logprobs[:50], strict=True):
        assert logprob == pytest.approx(float(wanted[token].log()), abs=1e-6)


def test_draws_at_the_borders_of_a_wide_vocabulary() -> None:
    class Fixed(random.Random):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def random(self) -> float:
            return self.value

    logits = torch.full((4, 1000), float("-inf"))
    logits[:, [3, 300, 999]] = 0.0
    draws: list[random.Random] = [Fixed(u) for u in (0.0, 0.34, 0.67, 1 - 2**-53)]
    ids, logprobs = choose(logits, [1.0] * 4, draws)
    assert ids == [3, 300, 999, 999]
    assert logprobs == pytest.approx([-1.0986123] * 4, abs=1e-6)
    only = torch.full((2, 1000), float("-inf"))
    only[:, 255] = 0.0
    assert choose(only, [1.0] * 2, [Fixed(0.0), Fixed(1 - 2**-53)])[0] == [255, 255]


def test_seeds_depend_on_the_request_alone() -> None:
    def draws(seed: int, order: list[tuple[list[int], list[str]]]) -> dict[str, list[float]]:
        seeds = RequestSeeds(seed)
        return {
            f"{ids} {names} {count}": [g.random() for g in seeds.generators(ids, names, 2)]
            for count, (ids, names) in enumerate(order)
        }

    requests = [([1, 2], ["a"]), ([1, 2], ["b"]), ([1, 2, 3], ["a"]), ([1, 2], [])]
    once = draws(0, requests)
    flat = [value for values in once.values() for value in values]
    assert len(set(flat)) == len(flat)
    assert sorted(flat) == sorted(v for vs in draws(0, requests[::-1]).values() for v in vs)
    assert draws(1, requests) != once
    seeds = RequestSeeds(0)
    first, again = (seeds.generators([1], ["a"], 1)[0].random() for _ in range(2))
    assert first != again
    # a seed of the request's own: the same whenever it comes, and another draw than any other
    own = [seeds.generators([1], ["a"], 1, seed)[0].random() for seed in (7, 8, 7)]
    assert own[0] == own[2] and len({*own, first, again}) == 4


def test_a_run_that_is_started_again_draws_the_same() -> None:
    """Also on the server that served the first start, and however often that one asked."""
    seeds = RequestSeeds(0)

    def draw(cartridge_id: str) -> float:
        return seeds.generators([1], [cartridge_id], 1)[0].random()

    first = [draw("mine-20260101000000-aaaa-step-000003") for _ in range(2)]
    assert [draw("mine-20260102000000-bbbb-step-000003") for _ in range(2)] == first
    assert draw("mine-20260102000000-bbbb-step-000004") not in first
    assert draw("by-hand") != draw("by-hand-too")


def test_counts_of_requests_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cartridge_distill.server.sampling._REQUESTS_KEPT", 3)
    seeds = RequestSeeds(0)

    def draw(token: int) -> float:
        return seeds.generators([token], [], 1)[0].random()

    first, *_ = [draw(token) for token in range(3)]
    again = draw(0)
    assert again != first
    draw(3)  # takes the place of 1, which came longest ago
    assert len(seeds._seen) == 3
    assert draw(0) not in (first, again)
    for token in range(1, 4):
        draw(token)
    assert draw(0) == first


def test_idle_engine_gives_memory_back(llama: PreTrainedModel, engine_of: EngineOf) -> None:
    engine = engine_of(llama)
    engine.submit(row(prompt(5, 0), 2, None)).result(60)
    deadline = time.monotonic() + 10
    while engine._buffers.slots and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine._buffers.slots == 0
