"""Log-probs of a bfloat16 model without its rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cartridge_distill.model.float32_forward import PACKED_TOKENS, float32_logprobs, leading
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.logprobs import chosen_logprobs
from cartridge_distill.model.packing import pack
from tests.tiny import ARCHITECTURES, VOCAB, plain_logprobs, random_cartridge, tiny_model


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_they_are_those_of_the_widened_model(kind: str) -> None:
    """The same bfloat16 numbers, copied into a float32 model, one sequence at a time."""
    served = tiny_model(kind).to(torch.bfloat16)
    wide = tiny_model(kind).to(torch.bfloat16).float()
    cartridge = random_cartridge(served)
    prefix = cartridge.prefix(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(3, VOCAB - 3, (n,), generator=generator) for n in (9, 30, 14)]
    response_masks = [torch.arange(len(ids)) >= 5 for ids in sequences]
    model = prepare_model(served)
    arguments = (cartridge.prefix(), sequences, response_masks, 0.7, torch.bfloat16)
    found = float32_logprobs(model, *arguments)
    expected = [
        value
        for ids in sequences
        for value in plain_logprobs(
            wide, prefix.to(dtype=torch.float32), ids[:5].tolist(), ids[5:].tolist(), 0.7
        )
    ]
    difference = (found - torch.tensor(expected)).abs().max()
    batch, mask = pack(sequences), torch.cat(response_masks)
    with torch.no_grad():
        logits = packed_forward(model, prefix, batch, batch.predicts(mask))
    rounded = chosen_logprobs(logits, batch.input_ids[mask], 0.7)
    rounding = (rounded - torch.tensor(expected)).abs().max()
    assert difference < rounding / 20
    assert logits.dtype == torch.bfloat16  # nothing stays behind
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_first_sequences_are_taken_up_to_a_bound() -> None:
    long, short = torch.zeros(PACKED_TOKENS + 1), torch.zeros(100)

    def taken(sequences: list[torch.Tensor], counted: int) -> int:
        masks = [np.arange(len(sequence)) < counted for sequence in sequences]
        return leading(sequences, masks)

    assert taken([long, short], 64) == 1
    assert taken([short] * 50, 20) == PACKED_TOKENS // 100
    assert taken([short] * 50, 4) == 16  # more, for enough tokens that count
    assert taken([short] * 3, 20) == 3
