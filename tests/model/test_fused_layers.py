"""Fused norms and gates: the model's own numbers, and only in classes that were compared."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cartridge_distill.model import fused_layers
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.fused_layers import NORMS, use_fused_layers, use_own_layers
from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.packing import pack
from tests.tiny import ARCHITECTURES, random_cartridge, tiny_model

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def modules(kind: str) -> list[nn.Module]:
    """One of each kind of norm and MLP in a model's first layer."""
    model: Any = tiny_model(kind).requires_grad_(False)
    layer = model.model.layers[0]
    found = [each for each in layer.modules() if type(each).__name__ in NORMS]
    return [*found, layer.mlp]


def both(module: nn.Module, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient."""
    asked = x.clone().requires_grad_()
    found = module(asked)
    (found * weights).sum().backward()
    assert asked.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(module(x.clone()), found, rtol=0, atol=0)
    return found.detach(), asked.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_values_and_gradients_are_the_models_own(kind: str, dtype: torch.dtype) -> None:
    for module in modules(kind):
        own: Any = module.to(dtype)
        fused = copy.deepcopy(own)
        use_fused_layers(fused)
        is_gelu = kind.startswith("gemma") and hasattr(own, "act_fn")
        assert (type(fused) is type(own)) == is_gelu, type(own)
        width = own.weight.shape[-1] if hasattr(own, "weight") else 64
        draw = torch.Generator().manual_seed(0)
        x, weights = (
            torch.randn(1, 7, int(width), generator=draw).mul(3).to(dtype) for _ in range(2)
        )
        exact = copy.deepcopy(own).float()
        expected = both(exact, x.float(), weights.float())
        for found, other in zip(both(fused, x, weights), expected, strict=True):
            assert found.dtype == dtype
            assert (found.float() - other).abs().max() <= BOUNDS[dtype] * other.abs().max()


@pytest.mark.parametrize("plus_one", [False, True])
def test_the_gradients_are_those_of_differences(plus_one: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x, up = (torch.randn(3, 6, generator=draw).double().requires_grad_() for _ in range(2))
    weight = torch.randn(6, generator=draw).double()
    norm = fused_layers._Norm.apply
    assert torch.autograd.gradcheck(lambda given: norm(given, weight, 0.1, plus_one), (x,))
    assert torch.autograd.gradcheck(fused_layers._Gate.apply, (x, up))


def test_what_computes_something_else_keeps_its_own_code() -> None:
    model: Any = tiny_model("llama").requires_grad_(False)
    first, second = model.model.layers
    own = type(first.mlp)

    class Scaled(type(first.input_layernorm)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = 2 * super().forward(x)
            return found

    Scaled.__name__, Scaled.__module__ = "LlamaRMSNorm", own.__module__
    first.input_layernorm.__class__ = Scaled  # of a known name, and another formula
    second.mlp.act_fn = nn.GELU()
    taken = use_fused_layers(model)
    assert "model.layers.0.input_layernorm" not in taken
    assert type(first.input_layernorm) is Scaled
    assert type(second.mlp) is own
    assert "model.layers.1.input_layernorm" in taken and "model.layers.0.mlp" in taken


def test_weights_that_are_trained_get_their_gradient() -> None:
    model: Any = tiny_model("llama")
    use_fused_layers(model)
    norm = model.model.norm
    norm(torch.randn(1, 2, 64)).sum().backward()
    assert norm.weight.grad is not None


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_forward_is_that_of_the_models_own_layers(kind: str) -> None:
    model = prepare_model(tiny_model(kind))
    cartridge = random_cartridge(model, 8)
    batch = pack([torch.arange(3, 9), torch.arange(40, 52)])

    def run() -> tuple[Tensor, Tensor]:
        cartridge.zero_grad()
        logits = packed_forward(model, cartridge.prefix(), batch)
        logits.square().sum().backward()
        grads = [part.grad for part in cartridge.trainable_parameters() if part.grad is not None]
        return logits.detach(), torch.cat([grad.flatten() for grad in grads])

    fused = run()
    names = {type(module).__name__ for module in model.modules()}
    use_own_layers(model)
    assert names != {type(module).__name__ for module in model.modules()}
    for found, expected in zip(fused, run(), strict=True):
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_loading_draws_nothing() -> None:
    model = tiny_model("llama").requires_grad_(False)
    before = torch.random.get_rng_state()
    assert use_fused_layers(model)
    assert torch.equal(torch.random.get_rng_state(), before)
