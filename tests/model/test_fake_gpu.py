"""The fake GPU computes what a CPU does, and tells each kind of wait from what is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.packing import pack
from tests.fake_gpu import FakeGpu, OnGpu
from tests.tiny import random_cartridge, tiny_model

VALUES = [3, 1, 2]
MASK = [True, False, True]


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda x, m: x.max().item(), ["read"]),
        (lambda x, m: bool(m.any()), ["read"]),
        (lambda x, m: x.tolist(), ["read"]),
        (lambda x, m: x.cpu(), ["read"]),
        (lambda x, m: x[m], ["shape"]),
        (lambda x, m: torch.nonzero(m), ["shape"]),
        (lambda x, m: torch.repeat_interleave(x, x), ["shape"]),
        (lambda x, m: torch.tensor(VALUES, device="cuda"), ["upload"]),
        (lambda x, m: torch.tensor(VALUES).to("cuda"), ["upload"]),
        (lambda x, m: x.copy_(torch.tensor(VALUES)), ["upload"]),
        (lambda x, m: torch.tensor(VALUES).to("cuda", non_blocking=True), ["staged"]),
        (lambda x, m: torch.tensor(VALUES).pin_memory().to("cuda", non_blocking=True), []),
        (lambda x, m: torch.repeat_interleave(x, x, output_size=6), []),
        (lambda x, m: torch.where(m, x, -1).scatter_reduce(0, x % 3, x, "amax"), []),
        (lambda x, m: x.masked_fill_(m, 0).sum() + torch.arange(3, device="cuda"), []),
    ],
)
def test_each_kind_of_wait(work: Callable[[Tensor, Tensor], object], expected: list[str]) -> None:
    with FakeGpu() as gpu:
        with gpu.quiet():
            x, mask = torch.tensor(VALUES, device="cuda"), torch.tensor(MASK, device="cuda")
        work(x, mask)
    assert [wait.what for wait in gpu.waits] == expected


def test_the_cpu_beside_the_gpu_is_refused_as_a_gpu_would() -> None:
    with FakeGpu(), pytest.raises(RuntimeError, match=r"\(3,\)\] lie on the CPU"):
        torch.ones(3, device="cuda") + torch.ones(3)


def step(gpu: FakeGpu | None) -> tuple[Tensor, list[Tensor]]:
    """A student's forward and backward: the logits and the cartridge's gradients."""
    model = prepare_model(tiny_model())
    cartridge = random_cartridge(model)
    device = "cpu"
    if gpu is not None:
        device = "cuda"
        gpu.put(model)
        gpu.put(cartridge)
    batch = pack([torch.arange(5, 25).to(device), torch.arange(30, 60).to(device)])
    logits = packed_forward(model, cartridge.prefix(), batch, backend="dense")
    logits.float().logsumexp(-1).sum().backward()
    gradients = [parameter.grad for parameter in cartridge.trainable_parameters()]
    return logits, [gradient for gradient in gradients if gradient is not None]


def test_a_forward_and_its_gradients_are_those_of_the_cpu() -> None:
    logits, gradients = step(None)
    with FakeGpu() as gpu:
        fake_logits, fake_gradients = step(gpu)
    assert isinstance(fake_logits, OnGpu) and len(fake_gradients) == len(gradients) == 4
    # On a CPU norms and the gated MLP are fused, and round otherwise.
    torch.testing.assert_close(fake_logits.inner, logits, atol=1e-5, rtol=1e-5)
    for fake, real in zip(fake_gradients, gradients, strict=True):
        # A frozen linear layer may have a kernel of its own on a CPU.
        assert isinstance(fake, OnGpu)
        torch.testing.assert_close(fake.inner, real, atol=5e-6, rtol=1e-5)


def test_a_wait_names_the_projects_own_line() -> None:
    with FakeGpu() as gpu:
        packed = pack([torch.arange(4, device="cuda")])
        packed.predicts(torch.tensor([False, True, True, True]).pin_memory().cuda())
    text = "\n".join(map(str, gpu.waits))
    assert "cartridge_distill/model/packing.py:" in text and "in predicts" in text
