"""Long sequences by torch's fused kernel: the dense reference's results, and only where it fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cartridge_distill.cartridge.kv_shape import KvShape
from cartridge_distill.model import attention, fused_causal
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.kept_tokens import KeptTokens
from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.packing import pack
from cartridge_distill.model.prefill import prefix_from_tokens
from tests.architectures import LAYERS_DIFFER, build
from tests.tiny import ARCHITECTURES, VOCAB, random_cartridge, tiny_model

FUSED_LAYERS = {
    "mistral_window": 0,  # both layers have a window of 24
    "gemma2": 0,  # a soft cap
    "gemma3": 1,  # every other layer has a window
}
"""Of the two layers; both where nothing is said."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Queries and keys of each call of the fused kernel, which must be the one without scores."""
    found: list[tuple[int, int]] = []
    real: Callable[..., Tensor] = fused_causal.fused_causal

    def counted(query: Tensor, key: Tensor, *others: Any) -> Tensor:
        found.append((query.shape[2], key.shape[1]))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return real(query, key, *others)

    monkeypatch.setattr(attention, "fused_causal", counted)
    return found


def ids_of(count: int, seed: int = 3) -> Tensor:
    return torch.randint(3, VOCAB - 9, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *LAYERS_DIFFER])
def test_a_long_document_has_the_same_kv(
    kind: str, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and in pieces behind those before them, whose queries are cut into chunks."""
    monkeypatch.setattr(fused_causal, "CHUNK", 30)
    model = prepare_model(tiny_model(kind) if kind in ARCHITECTURES else build(kind))
    ids = ids_of(150)
    whole = prefix_from_tokens(model, ids, "dense")
    for at_once in (150, 70):
        calls.clear()
        found = prefix_from_tokens(model, ids, "grouped", at_once)
        pairs = zip((*found.keys, *found.values), (*whole.keys, *whole.values), strict=True)
        for mine, reference in pairs:
            torch.testing.assert_close(mine, reference, atol=2e-5, rtol=0)
        pieces = [(150, 150)] if at_once == 150 else [(70, 70), (70, 140)]
        if kind in ARCHITECTURES:
            assert calls == [one for one in pieces for _ in range(FUSED_LAYERS.get(kind, 2))]
        else:
            assert set(calls) <= set(pieces) and calls


def test_bfloat16_is_as_near_to_float32_as_the_dense_reference(
    calls: list[tuple[int, int]],
) -> None:
    model, ids = prepare_model(tiny_model()), ids_of(200)
    exact = prefix_from_tokens(model, ids, "dense")
    model.bfloat16()
    off = []
    for backend in ("dense", "grouped"):
        found = prefix_from_tokens(model, ids, backend)
        off.append(
            max(float((a - b).abs().max()) for a, b in zip(found.keys, exact.keys, strict=True))
        )
    assert calls and off[1] < 1.5 * off[0]


@pytest.mark.parametrize("tokens", [fused_causal.LEAST_QUERIES - 1, fused_causal.LEAST_QUERIES])
def test_one_long_sequence_behind_a_prefix(tokens: int, calls: list[tuple[int, int]]) -> None:
    model = prepare_model(tiny_model())
    prefix, batch = random_cartridge(model, 32).prefix(), pack([ids_of(tokens)])
    with torch.no_grad():
        got = packed_forward(model, prefix, batch, backend="grouped")
        assert calls == [(tokens, 32 + tokens)] * 2 * (tokens == fused_causal.LEAST_QUERIES)
        expected = packed_forward(model, prefix, batch, backend="dense")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_follows_kept_tokens_is_the_end_of_its_sequence(calls: list[tuple[int, int]]) -> None:
    model = prepare_model(tiny_model())
    shape = KvShape.of(model.config)
    store = KeptTokens(shape, torch.float32, 10**7)
    prefix, batch = random_cartridge(model, 32).prefix(), pack([ids_of(150)])
    rows = torch.arange(150) >= 40
    expected = packed_forward(model, prefix, batch, rows, backend="dense")
    for _ in range(2):
        got = packed_forward(model, prefix, batch, rows, kept=store.behind("a"))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert calls == [(150, 182)] * 2 + [(110, 182)] * 2 and store.found == 40


def test_gradients_and_short_sequences_keep_the_plain_products(
    calls: list[tuple[int, int]],
) -> None:
    model = prepare_model(tiny_model())
    packed_forward(model, random_cartridge(model, 32).prefix(), pack([ids_of(150)]))
    with torch.no_grad():
        packed_forward(model, None, pack([ids_of(150), ids_of(140, 4)]))  # a group of two
        packed_forward(model, None, pack([ids_of(20)]))
    assert calls == []
