"""Sequences that begin alike have the same places as far as they do."""

from __future__ import annotations

import random

from cartridge_distill.model.token_trie import ROOT, TokenTrie


def places_of(sequences: list[list[int]]) -> list[list[int]]:
    """As a forward uses the trie: each sequence computes what no earlier one has."""
    trie, count, found = TokenTrie(), 0, []
    for ids in sequences:
        known = trie.find(ids)
        rest = ids[len(known) :]
        trie.add(rest, count, known[-1] if known else ROOT)
        found.append([*known, *range(count, count + len(rest))])
        count += len(rest)
    return found


def test_the_longest_beginning_is_found_among_several() -> None:
    found = places_of([[1, 2, 3], [1, 5], [1, 5, 6], [2, 2]])
    assert found == [
        [0, 1, 2],
        [0, 3],
        [0, 3, 4],
        [5, 6],
    ]


def test_a_token_that_is_computed_again_keeps_its_first_place() -> None:
    trie = TokenTrie()
    trie.add([7, 8, 9], 0)
    trie.add([9], 3, 1)  # a row's last token is always computed
    trie.add([4], 4, 3)
    assert trie.find([7, 8, 9]) == [0, 1, 2]


def test_two_tokens_have_one_place_if_and_only_if_their_pasts_are_equal() -> None:
    draw = random.Random(0)
    sequences = [[draw.randrange(2) for _ in range(draw.randrange(1, 9))] for _ in range(40)]
    past_of: dict[int, tuple[int, ...]] = {}
    for ids, places in zip(sequences, places_of(sequences), strict=True):
        for end, place in enumerate(places, 1):
            assert past_of.setdefault(place, tuple(ids[:end])) == tuple(ids[:end])
    assert len(set(past_of.values())) == len(past_of)
