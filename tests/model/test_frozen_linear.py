"""Linear layers by oneDNN: the same numbers as torch's own, and only where they suit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.frozen_linear import (
    FrozenLinear,
    onednn_is_faster,
    use_frozen_linear,
    use_torch_linear,
)
from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.packing import pack
from tests.tiny import ARCHITECTURES, random_cartridge, tiny_model

has_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="a torch without oneDNN"
)
called = "_FrozenProductBackward"


def layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 80, bias=bias).requires_grad_(False)


@has_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (1, 33, 48), (2, 5, 48)])
def test_product_and_gradient_are_torchs(bias: bool, shape: tuple[int, ...]) -> None:
    plain = layer(bias)
    x = torch.randn(shape)
    weights = torch.randn(*shape[:-1], 80)

    def both() -> tuple[Tensor, Tensor, str]:
        asked = x.clone().requires_grad_()
        found = plain(asked)
        (found * weights).sum().backward()
        assert asked.grad is not None and found.grad_fn is not None
        return found.detach(), asked.grad, found.grad_fn.name()

    expected, expected_grad, torchs = both()
    use_frozen_linear(plain)
    found, grad, ours = both()
    assert called in ours and called not in torchs
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)


@has_onednn
def test_a_gradient_of_any_strides() -> None:
    plain = layer(bias=False)
    x, weights = torch.randn(48, 6).t(), torch.randn(80, 6).t()
    grads = []
    for change in (use_torch_linear, use_frozen_linear):
        change(plain)
        asked = x.clone().requires_grad_()
        plain(asked).backward(weights)
        grads.append(asked.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)


@has_onednn
def test_what_it_does_not_suit_goes_torchs_way() -> None:
    ours = layer()
    use_frozen_linear(ours)
    x = torch.randn(3, 48, requires_grad=True)
    assert called in ours(x).grad_fn.name()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    assert ours(torch.empty(0, 48)).shape == (0, 80)
    assert ours.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    ours.float().requires_grad_(True)
    ours(x).sum().backward()
    assert ours.weight.grad is not None and ours.bias.grad is not None


@has_onednn
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_model_computes_the_same(kind: str) -> None:
    model = prepare_model(tiny_model(kind))
    batch = pack([torch.arange(1, 10), torch.arange(30, 31), torch.arange(40, 60)])
    names = list(model.state_dict())
    found = []
    for change in (use_torch_linear, use_frozen_linear):
        change(model)
        assert any(type(m) is FrozenLinear for m in model.modules()) is (
            change is use_frozen_linear
        )
        cartridge = random_cartridge(model)
        logits = packed_forward(model, cartridge.prefix(), batch)
        logits.logsumexp(-1).sum().backward()
        grads = [p.grad for p in cartridge.trainable_parameters()]
        found.append((logits.detach(), grads))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == names
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("vendor", "expected"), [("AuthenticAMD", True), ("GenuineIntel", False), (None, False)]
)
def test_chosen_by_the_vendor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str | None, expected: bool
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if vendor is not None:
        cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert onednn_is_faster(cpuinfo) is expected
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    onednn_is_faster.cache_clear()
    assert onednn_is_faster(cpuinfo) is False
    onednn_is_faster.cache_clear()


_EVER_NEW_SHAPES = """
import torch
from cartridge_distill.model.frozen_linear import use_frozen_linear

torch.set_num_threads(1)
layers = [torch.nn.Linear(64, n).requires_grad_(False) for n in (32, 64, 96)]
for layer in layers:
    use_frozen_linear(layer)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


for layer in layers:
    layer(torch.randn(1, 64))
before = resident()
for rows in range(2, 400):
    for layer in layers:
        layer(torch.randn(rows, 64))
print(resident() - before)
"""


@has_onednn
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux' /proc")
def test_kernels_of_shapes_that_never_come_again_are_forgotten() -> None:
    """Kept, the kernels of these 1,194 shapes take 0.5 GB."""
    limits = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    clean = {name: value for name, value in os.environ.items() if name not in limits}
    command = [sys.executable, "-c", _EVER_NEW_SHAPES]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean)
    assert int(done.stdout) < 250e6


@has_onednn
@pytest.mark.parametrize("shape", [(7, 48), (1, 33, 48)])
def test_a_model_may_write_into_what_it_gives(shape: tuple[int, ...]) -> None:
    """Gemma 3n scales a projection in place; autograd forbids that for views made in a function."""
    module = nn.Sequential(layer())
    use_frozen_linear(module)
    x = torch.randn(shape, requires_grad=True)
    found = module(x)
    assert type(found.grad_fn).__name__ == called
    found *= 2.0
    found.sum().backward()
    expected = 2.0 * module[0].weight.sum(0).expand(shape)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected, atol=1e-5, rtol=0)
