"""What a cartridge begins as: the first tokens, spans, and what is looked at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.model import attended
from cartridge_distill.model.attended import attended_prefix, attention_received
from cartridge_distill.model.beginning import first_cartridge, first_prefix, span_places
from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.prefill import prefix_from_tokens
from cartridge_distill.model.turning import Turner
from cartridge_distill.util.errors import ConfigError
from tests.tiny import VOCAB, tiny_model


def document(tokens: int = 60) -> Tensor:
    return torch.randint(3, VOCAB, (tokens,), generator=torch.Generator().manual_seed(5))


def own_weights(model: Any, ids: Tensor) -> list[Tensor]:
    """``[H, N]`` by the model's own eager attention, over document and document at once."""
    model.set_attn_implementation("eager")
    found = model(torch.cat([ids, ids])[None], output_attentions=True).attentions
    read, heads = len(ids), model.config.num_key_value_heads
    grouped = [each[0].view(heads, -1, 2 * read, 2 * read) for each in found]
    return [weights[:, :, read:, :read].amax((1, 2)) for weights in grouped]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("budget", [32 * 1024 * 1024, 500])
@torch.no_grad()
def test_weights_are_those_of_the_models_own_attention(
    kind: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soft caps and windows (gemma2) among them; in blocks of queries or at once."""
    monkeypatch.setattr(attended, "_SCORE_BUDGET", budget)
    model, ids = prepare_model(tiny_model(kind)), document(40)
    mine = attention_received(model, prefix_from_tokens(model, ids), ids)
    for layer, wanted in enumerate(own_weights(model, ids)):
        assert float(wanted.max()) > 0.02
        torch.testing.assert_close(mine[layer], wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_document_in_parts_is_read_behind_itself_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = prepare_model(tiny_model()), document(40)
    read = prefix_from_tokens(model, ids)
    monkeypatch.setattr(attended, "AGAIN", 16)
    monkeypatch.setattr(attended, "LEAST_AGAIN", 16)
    found = attention_received(model, read, ids)
    parts = [attention_received(model, read, part) for part in ids.split(16)]
    for layer, weights in enumerate(found):
        largest = torch.stack([each[layer] for each in parts]).amax(0)
        torch.testing.assert_close(weights, largest, atol=1e-6, rtol=0)


@torch.no_grad()
def test_each_head_has_the_tokens_it_looks_at_most_in_order_and_moved_up() -> None:
    model, ids = prepare_model(tiny_model()), document()
    read = prefix_from_tokens(model, ids)
    received, turner = attention_received(model, read, ids), Turner.of(model)
    found = attended_prefix(model, ids, 16, num_frozen_tokens=2)
    chosen_by_head = set()
    for layer, weights in enumerate(received):
        for head, row in enumerate(weights.tolist()):
            later = sorted(range(2, len(ids)), key=lambda place: -row[place])[:14]
            chosen = [0, 1, *sorted(later)]
            chosen_by_head.add(tuple(chosen))
            torch.testing.assert_close(
                found.values[layer][0, head], read.values[layer][0, head, chosen]
            )
            by = torch.arange(16) - torch.tensor(chosen)
            keys = turner.turn(layer, read.keys[layer][0, head, chosen], by)
            torch.testing.assert_close(found.keys[layer][0, head], keys)
    assert len(chosen_by_head) > 2  # heads choose for themselves


@pytest.mark.parametrize("init", ["text", "spans", "attended"])
@torch.no_grad()
def test_a_cartridge_as_long_as_the_document_is_the_documents_kv(init: str) -> None:
    model, ids = prepare_model(tiny_model()), document(48)
    whole = prefix_from_tokens(model, ids)
    cartridge = first_cartridge(model, ids, 48, 1, init).prefix()
    for mine, wanted in zip(
        (*cartridge.keys, *cartridge.values), (*whole.keys, *whole.values), strict=True
    ):
        torch.testing.assert_close(mine, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("read", "tokens"), [(100, 32), (100, 33), (48, 48), (20, 5), (1000, 128)])
def test_spans_lie_evenly_over_the_whole_document(read: int, tokens: int) -> None:
    places = span_places(read, tokens).tolist()
    assert len(places) == tokens == len(set(places)) and places == sorted(places)
    assert places[0] == 0 and places[-1] <= read - 1
    if tokens >= 32:
        assert places[-1] == read - 1
        jumps = [b - a for a, b in zip(places, places[1:], strict=False) if b - a > 1]
        assert not jumps or max(jumps) - min(jumps) <= 1


def test_spans_are_read_one_after_the_other() -> None:
    model, ids = prepare_model(tiny_model()), document(100)
    wanted = prefix_from_tokens(model, ids[span_places(100, 32)])
    found: Prefix = first_prefix(model, ids, 32, 1, "spans")
    torch.testing.assert_close(found.keys[1], wanted.keys[1])


def test_what_cannot_be_had_is_refused_by_name() -> None:
    model, ids = prepare_model(tiny_model()), document()
    with pytest.raises(ConfigError, match="init='atended' is unknown.*attended"):
        first_cartridge(model, ids, 16, 1, "atended")
    with pytest.raises(ConfigError, match="60 tokens, the cartridge 64"):
        first_cartridge(model, ids, 64, 1, "attended")
    context = model.config.max_position_embeddings
    with pytest.raises(ConfigError, match=f"{context - 5} tokens .* context of {context}.*init="):
        first_cartridge(model, document(context - 5), 16, 1, "attended")


@torch.no_grad()
def test_attention_is_the_same_with_somebody_looking() -> None:
    model, ids = prepare_model(tiny_model()), document(30)
    from cartridge_distill.model.forward import run_packed
    from cartridge_distill.model.packing import pack

    prefix, seen = prefix_from_tokens(model, ids), []

    def note(layer: int, query: Tensor, key: Tensor, past: Tensor, _: Any) -> None:
        seen.append((layer, query.shape[1], key.shape[1], past.shape[1]))

    plain = run_packed(model, prefix, pack([ids[:7]]), backend="grouped")
    looked = run_packed(model, prefix, pack([ids[:7]]), backend="grouped", observer=note)
    assert torch.equal(plain, looked)
    layers = model.config.num_hidden_layers
    assert seen == [(layer, 7, 7, 30) for layer in range(layers)]
