"""Prompts' keys and values that are kept: the same results, the right tokens, within the bytes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cartridge_distill.cartridge.kv_shape import KvShape
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.model.forward import packed_forward, run_packed
from cartridge_distill.model.kept_tokens import KeptTokens
from cartridge_distill.model.layout import _shared_beginnings
from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.packing import pack
from cartridge_distill.util.errors import ConfigError
from tests.architectures import LAYERS_DIFFER, build
from tests.tiny import ARCHITECTURES, tiny_model

PROMPTS = (30, 1, 12, 12, 5)
SAME, OTHER = 30 + 1 + (5 - 1), 2
"""Tokens before the first row that is asked for: those that come again, and those that do not. The
row that predicts an answer's first counted token is no part of them, and always computed."""


def batch_of(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Sequences whose prompts come again with every seed, with answers that do not.

    The third prompt is the first one's beginning, the fourth is the third, the second has one
    token. Of the first two answers only the later tokens count.
    """
    fixed, draw = (torch.Generator().manual_seed(number) for number in (0, seed + 1))
    first, one, other = (torch.randint(3, 250, (n,), generator=fixed) for n in (30, 1, 5))
    prompts = [first, one, first[:12], first[:12], other]
    assert tuple(map(len, prompts)) == PROMPTS
    answers = [torch.randint(3, 250, (n,), generator=draw) for n in (4, 6, 1, 3, 8)]
    sequences = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
    masks = [
        torch.arange(len(ids)) >= len(prompt) + (2 if number < 2 else 0)
        for number, (prompt, ids) in enumerate(zip(prompts, sequences, strict=True))
    ]
    return sequences, masks


def store_for(model: PreTrainedModel, tokens: int = 1000) -> KeptTokens:
    shape = KvShape.of(model.config)
    return KeptTokens(shape, torch.float32, tokens * 4 * shape.numbers)


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *LAYERS_DIFFER])
@torch.no_grad()
def test_a_row_with_kept_beginnings_is_the_row_without(kind: str) -> None:
    """Behind two prefixes and none, with room for all tokens and for few; windows are 24 wide."""
    model = prepare_model(tiny_model(kind) if kind in ARCHITECTURES else build(kind))
    prefixes = {
        name: None
        if name is None
        else TrainableCache.from_random(model.config, 16, std=1.0, seed=len(name)).prefix()
        for name in ("a", "bb", None)
    }
    roomy, tight = store_for(model), store_for(model, 100)
    for seed in range(3):
        sequences, masks = batch_of(seed)
        for name, prefix in prefixes.items():
            batch = pack(sequences)
            rows = batch.predicts(torch.cat(masks))
            expected = packed_forward(model, prefix, batch, rows)
            for store in (roomy, tight):
                got = packed_forward(model, prefix, batch, rows, kept=store.behind(name))
                torch.testing.assert_close(got, expected, atol=3e-5, rtol=0)
                assert len(store) <= store.capacity and store.bytes
    assert len(roomy) == roomy.computed == 3 * (SAME + 3 * OTHER) and len(tight) == 100
    assert roomy.found == 3 * 2 * SAME and 0 < tight.found < roomy.found


@torch.no_grad()
def test_only_what_follows_the_known_tokens_is_computed() -> None:
    model, seen = prepare_model(tiny_model()), list[int]()
    model.get_input_embeddings().register_forward_hook(
        lambda _, args, __: seen.append(args[0].numel())
    )
    store = store_for(model)
    for seed in range(2):
        sequences, masks = batch_of(seed)
        batch = pack(sequences)
        packed_forward(model, None, batch, batch.predicts(torch.cat(masks)), kept=store.behind("a"))
    # An answer's last token predicts nothing that is asked for. The prompts of the third and the
    # fourth end in one token, which is computed for both; in the first row the first prompt has it.
    asked = (4 - 1) + (6 - 1) + 1 + (3 - 1) + 8
    assert seen == [SAME + asked - 1, asked]
    assert (store.computed, store.found) == (SAME + 2 * OTHER, SAME)


def worth(past: tuple[object, ...]) -> float:
    """A number that stands for a token's past."""
    return float(hash(past) % 1_000_003)


def forward(
    store: KeptTokens, prefix: str, sequences: list[list[int]], prompts: list[int], fails: bool
) -> None:
    """A row of one layer whose keys say what past they are of; every one that is read is right."""
    batch = pack([torch.tensor(ids) for ids in sequences])
    kept = store.behind(prefix).of_row(batch, np.array(prompts))
    computed, numbers = _shared_beginnings(batch, kept.known, kept.count)
    kept.plan(numbers, batch.offsets)
    pasts = [(prefix, *ids[: end + 1]) for ids in sequences for end in range(len(ids))]
    own = torch.tensor([worth(pasts[place]) for place in computed]).view(1, -1, 1)
    keys, values = kept.take(0, own, -own, owner=True)
    for number, past in zip(numbers, pasts, strict=True):
        assert keys[0, number, 0] == worth(past) and values[0, number, 0] == -worth(past)
    if not fails:
        kept.keep()


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_no_token_is_ever_taken_for_another(tokens: int) -> None:
    """Random rows, some of which fail half-way, in a store that is too small for them."""
    draw = random.Random(tokens)
    store = KeptTokens(KvShape(1, 1, 1), torch.float32, tokens * 8)
    assert store.capacity == tokens
    for _ in range(300):
        sequences = [
            [draw.randrange(3) for _ in range(draw.randrange(1, 9))]
            for _ in range(draw.randrange(1, 5))
        ]
        prompts = [draw.randrange(len(ids)) for ids in sequences]
        forward(store, draw.choice("ab"), sequences, prompts, draw.random() < 0.2)
        assert len(store) <= tokens
        # Every kept token is found from its prefix on: none stands behind one that is gone.
        assert all(edge[0] in store._edges or edge[0] in (("a",), ("b",)) for edge in store._next)
    assert len(store) > tokens // 2 and store.found


def test_the_least_recently_used_goes_first() -> None:
    store = KeptTokens(KvShape(1, 1, 1), torch.float32, 5 * 8)
    for ids in ([1, 2, 9], [3, 4, 9], [1, 2, 9], [5, 6, 9]):
        forward(store, "a", [ids], [2], False)  # the last token is no prompt's
    found = {ids: len(store._path("a", ids)) for ids in ((1, 2), (3, 4), (5, 6))}
    assert found == {(1, 2): 2, (3, 4): 1, (5, 6): 2}  # and of a path its end
    assert store._path("b", (1, 2)) == []
    store.clear()
    assert (len(store), store.bytes, store._path("a", (1, 2))) == (0, 0, [])


def test_a_store_without_room_keeps_nothing() -> None:
    store = KeptTokens(KvShape(1, 1, 1), torch.float32, 7)
    for _ in range(2):
        forward(store, "a", [[1, 2, 3]], [2], False)
    assert (len(store), store.found, store.computed) == (0, 0, 4)


def test_what_is_new_is_told_and_forgotten() -> None:
    store = KeptTokens(KvShape(1, 1, 1), torch.float32, 100)
    forward(store, "a", [[1, 2, 9], [1, 3, 9]], [2, 2], False)
    store.settled()
    forward(store, "a", [[1, 2, 5, 9], [1, 3, 9], [4, 9]], [3, 2, 1], False)
    forward(store, "b", [[1, 9], [1, 6, 9]], [1, 2], False)
    assert store.new_paths() == [("a", [1, 2, 5]), ("a", [4]), ("b", [1, 6])]
    store.forget_new()
    assert (len(store), store.new_paths(), store._path("a", [1, 2, 5])) == (3, [], [0, 1])
    assert store._path("b", [1]) == []


@torch.no_grad()
def test_whole_sequences_are_kept_with_their_last_token() -> None:
    model = prepare_model(tiny_model())
    store, batch = store_for(model), pack([torch.arange(5, 9), torch.arange(5, 12)])
    last = np.array([False] * 3 + [True] + [False] * 6 + [True])
    got = packed_forward(model, None, batch, last, kept=store.behind("a", whole=True))
    torch.testing.assert_close(got, packed_forward(model, None, batch, last), atol=1e-5, rtol=0)
    assert len(store) == 7
    with pytest.raises(ValueError, match="logits of tokens that are kept"):
        packed_forward(model, None, batch, last, kept=store.behind("a", whole=True))


def test_what_cannot_be_kept_is_refused() -> None:
    model = prepare_model(tiny_model())
    store, batch = store_for(model), pack([torch.arange(5, 12)])
    with pytest.raises(ValueError, match=r"under torch.no_grad\(\)"):
        packed_forward(model, None, batch, kept=store.behind("a"))
    with torch.no_grad():
        with pytest.raises(ValueError, match="without cache and starts"):
            run_packed(model, None, batch, starts=[3], kept=store.behind("a"))
        last = np.arange(7) == 6
        packed_forward(model, None, batch, last, kept=store.behind("a"))
        with pytest.raises(ConfigError, match="float64 .* kept .* in torch.float32"):
            packed_forward(model.double(), None, batch, last, kept=store.behind("a"))
