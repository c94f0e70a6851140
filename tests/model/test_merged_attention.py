"""Grouped attention in one step of autograd: the plain products' values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.model import attention, frozen_linear, merged_attention
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.layout import PackedLayout
from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.packing import pack
from cartridge_distill.model.scoring import Scoring
from tests.tiny import random_cartridge, tiny_model

HEADS, PER_HEAD, SIZE = 2, 3, 8


def layout_of(prefix_tokens: int, lengths: tuple[int, ...] = (7, 7, 2, 12, 30)) -> PackedLayout:
    """Two sequences begin alike; lengths lie so far apart that there is more than one group."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 200, (length,), generator=draw) for length in lengths]
    ids[1][:2] = ids[0][:2]
    shape = (1, HEADS, prefix_tokens, SIZE)
    prefix = Prefix([torch.zeros(shape)], [torch.zeros(shape)]) if prefix_tokens else None
    return PackedLayout(pack(ids), prefix, "grouped", share_beginnings=True)


def inputs(layout: PackedLayout, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values of the row, then keys and values of the prefix."""
    draw = torch.Generator().manual_seed(1)
    row, before = len(layout.computed), layout.prefix_tokens
    shapes = [(HEADS * PER_HEAD, row), (HEADS, row), (HEADS, row)]
    shapes += [(HEADS, before), (HEADS, before)] if before else []
    return [
        torch.randn(*shape, SIZE, generator=draw).to(dtype).requires_grad_() for shape in shapes
    ]


def merged(layout: PackedLayout, given: list[Tensor]) -> Tensor:
    past = (given[3], given[4]) if len(given) > 3 else None
    found = merged_attention.merged_attention(layout, *given[:3], past, 0.3)
    return found.transpose(0, 1)


def plain(layout: PackedLayout, given: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    past = (given[3], given[4]) if len(given) > 3 else None
    with monkeypatch.context() as patched:
        patched.setattr(attention, "is_mergeable", lambda *_: False)
        return attention._grouped(layout, *given[:3], past, Scoring(0.3, None, None))


@pytest.mark.parametrize("prefix_tokens", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small", [False, True], ids=["whole", "cut"])
def test_values_and_gradients_are_those_of_the_plain_products(
    prefix_tokens: int, dtype: torch.dtype, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:  # a sequence a piece, and rows of the prefix' product by threes
        monkeypatch.setattr(merged_attention, "SCORES_AT_ONCE", 17)
    monkeypatch.setattr(frozen_linear, "LEAST_ROWS", 1)
    layout = layout_of(prefix_tokens)
    exact = [each.detach().double().requires_grad_() for each in inputs(layout, dtype)]
    expected = plain(layout, exact, monkeypatch)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).double()
    expected_grads = torch.autograd.grad((expected * weights).sum(), exact)

    given = inputs(layout, dtype)
    found = merged(layout, given)
    grads = torch.autograd.grad((found * weights.to(dtype)).sum(), given)
    # The plain products take their softmax in float32 whatever they are given.
    bound = {torch.float64: 2e-6, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip((found, *grads), (expected, *expected_grads), strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).abs().max() <= bound * other.abs().max()
    with torch.no_grad():
        torch.testing.assert_close(merged(layout, given), found, rtol=0, atol=0)


@pytest.mark.parametrize("prefix_tokens", [0, 3])
def test_the_gradient_is_that_of_differences(prefix_tokens: int) -> None:
    layout = layout_of(prefix_tokens, (3, 5, 2))
    given = inputs(layout, torch.float64)
    assert torch.autograd.gradcheck(lambda *parts: merged(layout, list(parts)), given)


def test_the_prefix_alone_may_be_trained() -> None:
    """The first layer: what its queries are made of has no gradient."""
    layout = layout_of(5)
    given = inputs(layout, torch.float64)
    expected = torch.autograd.grad(merged(layout, given).square().sum(), given[3:])
    given[:3] = [each.detach() for each in given[:3]]
    found = torch.autograd.grad(merged(layout, given).square().sum(), given[3:])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("kind", "merges"), [("llama", 2), ("gemma2", 0), ("gemma3", 1), ("mistral_window", 0)]
)
def test_layers_with_soft_caps_and_short_windows_keep_the_plain_products(
    kind: str, merges: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways may come in one forward; each has its own order of the queries."""
    calls = []
    real = merged_attention.merged_attention

    def counted(*given: object) -> Tensor:
        calls.append(given)
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "merged_attention", counted)
    monkeypatch.setattr(attention, "_SCORE_BUDGET", 300)  # the plain way cuts its queries
    model = prepare_model(tiny_model(kind))
    prefix = random_cartridge(model, 16).prefix()
    draw = torch.Generator().manual_seed(3)
    batch = pack([torch.randint(3, 200, (count,), generator=draw) for count in (5, 17, 5, 29)])
    expected = packed_forward(model, prefix, batch, backend="dense")
    calls.clear()  # those of the comparison at load
    found = packed_forward(model, prefix, batch, backend="grouped")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == merges


def test_a_longer_sequence_than_is_held_at_once_takes_the_plain_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = layout_of(5)
    given = inputs(layout, torch.float32)
    asked = layout, given[0], given[1], Scoring(0.3, None, None)
    assert merged_attention.is_mergeable(*asked)
    monkeypatch.setattr(merged_attention, "MOST_SCORES", 30 * 30 * HEADS * PER_HEAD - 1)
    assert not merged_attention.is_mergeable(*asked)
