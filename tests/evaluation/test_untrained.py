"""The untrained cartridge of an evaluation is the one that training began with."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cartridge_distill.evaluation.conditions import began_as, untrained
from cartridge_distill.model.beginning import first_prefix
from tests.evaluation.made import teacher


@pytest.mark.parametrize(
    ("recipe", "init"),
    [
        ({"cartridge.init": "attended"}, "attended"),
        ({"cartridge.init": "spans"}, "spans"),
        ({"cartridge.init": "text"}, "text"),
        ({"cartridge.init": "random"}, "text"),
        ({}, "text"),
    ],
)
def test_it_begins_as_the_recipe_says(
    packed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: dict[str, str],
    init: str,
) -> None:
    reads = teacher(packed, tokenizer)
    condition = untrained(reads, "two", 32, 2, began_as(recipe))
    found = condition.view("two", "?").prefix
    wanted = first_prefix(packed, torch.tensor(reads.document_ids("two")), 32, 2, init)
    assert found is not None
    for mine, other in zip(found.keys, wanted.keys, strict=True):
        assert torch.equal(mine, other)
    others = {"text", "spans", "attended"} - {init}
    for other in others:
        ids = torch.tensor(reads.document_ids("two"))
        assert not torch.equal(found.values[1], first_prefix(packed, ids, 32, 2, other).values[1])
