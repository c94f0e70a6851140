"""A tiny model with the packed attention."""

from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedModel

from cartridge_distill.model.loading import prepare_model


@pytest.fixture
def packed(llama: PreTrainedModel) -> PreTrainedModel:
    return prepare_model(copy.deepcopy(llama))
