"""Slots, layers and heads: which number of a cartridge goes where."""

from __future__ import annotations

import pytest

from cartridge_distill.engines.vllm.placing import heads_of_rank, layer_number, slots
from cartridge_distill.util.errors import ConfigError


def test_slots_go_through_the_blocks_in_their_order() -> None:
    assert slots([5, 2], 4, 0, 6) == ([0, 1, 2, 3, 4, 5], [20, 21, 22, 23, 8, 9])


def test_slots_of_what_is_not_cached_yet() -> None:
    assert slots([5, 2, 9], 4, 4, 10) == ([4, 5, 6, 7, 8, 9], [8, 9, 10, 11, 36, 37])


def test_what_a_window_has_left_behind_is_not_written() -> None:
    assert slots([0, 2], 4, 0, 7) == ([4, 5, 6], [8, 9, 10])
    assert slots([0, 0], 4, 0, 8) == ([], [])


@pytest.mark.parametrize(("start", "end"), [(0, 9), (-1, 2)])
def test_blocks_that_do_not_reach(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="do not lie in 2 blocks of 4"):
        slots([5, 2], 4, start, end)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model.layers.3.self_attn.attn", 3),
        ("language_model.model.layers.11.self_attn.attn", 11),
        ("transformer.h.0.attn.attn", 0),
    ],
)
def test_layers_by_name(name: str, number: int) -> None:
    assert layer_number(name) == number


@pytest.mark.parametrize("name", ["model.attn", "mtp.0.layers.3.attn"])
def test_a_name_that_does_not_say_the_layer(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        layer_number(name)


@pytest.mark.parametrize(("total", "ranks"), [(8, 1), (8, 2), (8, 8)])
def test_every_head_is_on_one_rank(total: int, ranks: int) -> None:
    heads = list(range(total))
    found = [head for rank in range(ranks) for head in heads[heads_of_rank(total, rank, ranks)]]
    assert found == heads


def test_more_ranks_than_heads() -> None:
    found = [list(range(2))[heads_of_rank(2, rank, 8)] for rank in range(8)]
    assert found == [[0], [0], [0], [0], [1], [1], [1], [1]]


def test_heads_that_cannot_be_shared_out() -> None:
    with pytest.raises(ConfigError, match="3 KV heads .* 2 ranks"):
        heads_of_rank(3, 0, 2)
