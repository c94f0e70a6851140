"""Keys that were moved are those that the model computes there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.turning import HALF_TOLERANCE, Rotation, Turner, _keys
from cartridge_distill.util.errors import ConfigError
from tests.tiny import tiny_model

IDS = torch.tensor([7, 31, 12, 58, 9, 44])


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3", "phi3", "glm", "smollm3"])
def test_every_layers_keys_elsewhere(kind: str) -> None:
    """Half of a head turned (phi3, glm), neighbours (glm), two bases (gemma3), no positions in some
    layers (smollm3)."""
    model = prepare_model(tiny_model(kind))
    turner = Turner.of(model)
    here, there = _keys(model, IDS, 3), _keys(model, IDS, 50)
    for layer, (keys, wanted) in enumerate(zip(here, there, strict=True)):
        by = torch.full(keys.shape[:2], 47)
        torch.testing.assert_close(turner.turn(layer, keys, by), wanted, atol=2e-5, rtol=0)
        back = turner.turn(layer, wanted, -by)
        torch.testing.assert_close(back, keys, atol=2e-5, rtol=0)


def test_each_head_and_token_by_its_own_distance() -> None:
    model = prepare_model(tiny_model())
    turner = Turner.of(model)
    (first, *_), count = _keys(model, IDS, 0), len(IDS)
    by = torch.stack([torch.arange(count) * (head + 1) for head in range(first.shape[0])])
    turned = turner.turn(0, first, by)
    for head in range(first.shape[0]):
        for token in range(count):  # the first layer's keys depend on token and position alone
            alone = _keys(model, IDS[token : token + 1], token + int(by[head, token]))[0]
            torch.testing.assert_close(turned[head, token], alone[head, 0], atol=1e-5, rtol=0)


def test_in_bfloat16_keys_stay_bfloat16() -> None:
    model = prepare_model(tiny_model().bfloat16())
    turner = Turner.of(model)
    here, there = _keys(model, IDS, 0)[1], _keys(model, IDS, 20)[1]
    turned = turner.turn(1, here, torch.full(here.shape[:2], 20))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned, there, atol=3e-2, rtol=2e-2)


def test_many_layers_in_bfloat16_are_found_out_about_in_float32() -> None:
    """Rounding adds up over layers: in bfloat16 itself the keys would not agree."""
    model = prepare_model(tiny_model(num_hidden_layers=24).bfloat16())
    here, there = _keys(model, IDS, 0)[23], _keys(model, IDS, 20)[23]
    turned = Turner.of(model).turn(23, here, torch.full(here.shape[:2], 20))
    off = float((turned.float() - there.float()).abs().max() / there.float().std())
    assert HALF_TOLERANCE < off < 1


def test_a_model_with_positions_elsewhere_is_refused_by_name() -> None:
    model = prepare_model(tiny_model("gpt2", num_key_value_heads=4))
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel: layer 0: .*init=text"):
        Turner.of(model)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_is_the_papers(interleaved: bool) -> None:
    angles = torch.tensor([1.0, 0.1])

    def matrix(by: float) -> Tensor:
        found = torch.eye(5)
        for pair, angle in enumerate(angles * by):
            a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 2)
            found[a, a] = found[b, b] = angle.cos()
            found[a, b], found[b, a] = -angle.sin(), angle.sin()
        return found

    keys = torch.randn(3, 5)  # the last number has no position
    by = torch.tensor([0, 4, -9])
    wanted = torch.stack([matrix(float(n)) @ key for n, key in zip(by, keys, strict=True)])
    found = Rotation(angles, interleaved).turn(keys, by)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
