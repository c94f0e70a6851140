"""Kept beginnings: the results of no sharing, one computation for all, and a bound."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedModel

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.server.beginnings import Beginnings
from cartridge_distill.server.engine import Engine
from cartridge_distill.server.rows import Row
from cartridge_distill.server.settings import ServerSettings
from cartridge_distill.util.errors import ConfigError
from tests.server.conftest import EngineOf
from tests.tiny import ARCHITECTURES, plain_logprobs, random_cartridge, tiny_model

TOLERANCE = 1e-5
SMALL = {"prefix_cache_min_tokens": 16, "prefill_chunk": 24}


def tokens(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(256) for _ in range(count)]


def answers(engine: Engine, prompts: list[list[int]]) -> list[tuple[list[int], list[float], int]]:
    rows = [Row(list(ids), 4, 0.7, random.Random(str(ids))) for ids in prompts]
    results = [future.result(60) for future in [engine.submit(row) for row in rows]]
    return [(result.token_ids, result.logprobs, result.shared_tokens) for result in results]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_results_are_those_of_no_sharing(kind: str, engine_of: EngineOf) -> None:
    """Two documents with a heading in common, several prompts each, over two batches."""
    model = tiny_model(kind)
    heading = tokens(20, 0)
    documents = [heading + tokens(60, 1), heading + tokens(33, 2)]
    prompts = [documents[n % 2] + tokens(1 + 3 * n, 10 + n) for n in range(8)]
    sharing, plain = engine_of(model, **SMALL), engine_of(model, **SMALL, prefix_cache_tokens=0)
    for part in (prompts[:4], prompts[4:], [prompts[0]]):
        for ids, got, wanted in zip(
            part, answers(sharing, part), answers(plain, part), strict=True
        ):
            assert got[0] == wanted[0]
            assert got[1] == pytest.approx(wanted[1], abs=TOLERANCE, rel=0)
            reference = plain_logprobs(model, None, ids, got[0], 0.7)
            assert got[1] == pytest.approx(reference, abs=TOLERANCE, rel=0)
            assert got[2] >= len(documents[prompts.index(ids) % 2])
    # each document once, each rest at most once; the heading is not computed twice either
    unique = sum(map(len, documents)) - len(heading)
    rests = sum(1 + 3 * n for n in range(8)) + 1
    assert sharing.stats.prompt_tokens <= unique + rests
    assert plain.stats.prompt_tokens > 2 * unique


def test_a_beginning_that_comes_one_request_at_a_time_is_found(
    llama: PreTrainedModel, engine_of: EngineOf
) -> None:
    engine = engine_of(llama, **SMALL)
    document = tokens(50, 3)
    shared = [answers(engine, [[*document, n, n]])[0][2] for n in (1, 2, 3)]
    assert shared == [0, 50, 50]  # alone it is not worth keeping
    assert engine.stats.prompt_tokens == 52 + (50 + 2) + 2


def test_rows_with_a_cartridge_are_left_alone(llama: PreTrainedModel, engine_of: EngineOf) -> None:
    engine = engine_of(llama, **SMALL)
    prefix, document = random_cartridge(llama).prefix(), tokens(50, 4)
    rows = [Row([*document, n], 2, 0.0, random.Random(0), prefix) for n in range(3)]
    for row in rows:
        engine.submit(row).result(60)
        assert row.prefix is prefix
    assert engine.stats.shared_tokens == 0


def test_memory_is_bounded_and_the_least_recently_used_goes(
    llama: PreTrainedModel, engine_of: EngineOf
) -> None:
    engine = engine_of(llama, **SMALL, prefix_cache_tokens=100)
    documents = [tokens(40, n) for n in range(3)]

    def ask(number: int) -> int:
        pair = [[*documents[number], n] for n in (1, 2)]
        before = engine.stats.prompt_tokens
        assert all(shared == 40 for _, _, shared in answers(engine, pair))
        assert engine._beginnings.tokens <= 100
        return engine.stats.prompt_tokens - before

    assert [ask(0), ask(1), ask(0)] == [42, 42, 2]
    assert [ask(2), ask(0), ask(1)] == [42, 2, 42]  # 1 had to go, and was not the last used
    long = tokens(150, 9)  # over the bound: as much as fits is kept
    shared = [shared for *_, shared in answers(engine, [[*long, 1], [*long, 2]])]
    assert min(shared) == 100 == engine._beginnings.tokens


def test_what_only_some_prompts_share_is_not_kept() -> None:
    """Three questions after a document, two of which begin alike for a few tokens."""
    computed: list[int] = []
    model = random_cartridge(tiny_model(), 256).prefix()

    def compute(ids: list[int], before: Prefix | None) -> Prefix:
        computed.append(len(ids))
        return Prefix(
            [key[:, :, : len(ids)] for key in model.keys],
            [value[:, :, : len(ids)] for value in model.values],
        )

    beginnings = Beginnings(compute, max_tokens=1000, min_tokens=16)
    document, question = tokens(50, 5), tokens(10, 6)
    prompts = [document + question + [1], document + question + [2], document + tokens(5, 7)]
    found = beginnings.find(prompts)
    assert [len(one.ids) if one else 0 for one in found] == [50, 50, 50]
    assert computed == [50]
    assert found[0] is found[1] is found[2]
    assert beginnings.find([tokens(60, 8), tokens(9, 9)]) == [None, None]


def test_what_is_expected_is_kept_before_it_comes_twice() -> None:
    document = tokens(60, 1)
    engine = Engine(tiny_model(), ServerSettings(**SMALL))
    assert engine.expect(document) == 60
    assert engine.stats.prompt_tokens == 60
    assert engine.expect(tokens(9, 2)) == 0  # too short to be kept
    bounded = Engine(tiny_model(), ServerSettings(**SMALL, prefix_cache_tokens=70))
    for seed in (1, 3):
        assert bounded.expect(tokens(60, seed)) == 60
    assert bounded._beginnings.tokens == 60  # the second took the first one's place
    assert not engine.is_alive


@pytest.mark.parametrize("setting", ["prefix_cache_tokens", "prefix_cache_min_tokens"])
def test_nonsense_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=setting):
        ServerSettings(**{setting: -1})
