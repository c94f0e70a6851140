"""A step of student and teacher, and for what in it the host would wait on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.distill.loss import get_loss
from cartridge_distill.distill.teacher import Teacher
from cartridge_distill.model import flex
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.logprobs import chosen_logprobs
from cartridge_distill.model.packing import pack
from tests.fake_gpu import FakeGpu, OnGpu, dense_of_a_block_mask
from tests.tiny import random_cartridge, tiny_model

LENGTHS, RESPONSE = (20, 30, 9), 6
DOCUMENTS = {"red": "the red house", "blue": "the blue boat"}


def one_step(gpu: FakeGpu | None, backend: str) -> tuple[Tensor, list[Tensor]]:
    """The loss of one micro-batch about two documents, and the cartridge's gradients.

    The document's KV is there already, as from the second step on.
    """
    model = prepare_model(tiny_model("gemma2"))
    cartridge = random_cartridge(model)
    device = torch.device("cpu")
    teacher = Teacher(
        model, DocumentStore(DOCUMENTS), lambda text: [256, *text.encode()], backend=backend
    )
    if gpu is not None:
        device = torch.device("cuda", 0)
        gpu.put(model)
        gpu.put(cartridge)
        with gpu.quiet():
            for name in DOCUMENTS:
                teacher.prefix(name)
    sequences = [torch.arange(length) + 5 for length in LENGTHS]
    response_masks = [(torch.arange(length) >= length - RESPONSE).numpy() for length in LENGTHS]
    batch = pack(sequences).to(device)
    response_mask = torch.cat([torch.from_numpy(mask) for mask in response_masks])
    logits = packed_forward(
        model, cartridge.prefix(), batch, batch.predicts(response_mask), backend
    )
    student = chosen_logprobs(logits.detach(), batch.tokens(response_mask))
    found = teacher.score(sequences, response_masks, ["red", "blue", "red"], 5)
    loss = get_loss("forward_kl_topk")(logits, found, 1.0).mean() + 0 * student.mean()
    loss.backward()
    gradients = [parameter.grad for parameter in cartridge.trainable_parameters()]
    return loss.detach(), [gradient for gradient in gradients if gradient is not None]


@pytest.fixture
def flex_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "compile_and_call", dense_of_a_block_mask)


def test_student_and_teacher_never_wait(flex_stand_in: None) -> None:
    with FakeGpu() as gpu:
        loss, gradients = one_step(gpu, "flex")
    assert not gpu.waits, "the host would wait:\n" + "\n".join(map(str, gpu.waits))
    real_loss, real_gradients = one_step(None, "dense")
    assert isinstance(loss, OnGpu) and torch.allclose(loss.inner, real_loss, atol=1e-6)
    for fake, real in zip(gradients, real_gradients, strict=True):
        assert isinstance(fake, OnGpu) and torch.allclose(fake.inner, real, atol=1e-6)
