"""The trainable prefix and its versions; its files are in tests/cartridge/formats."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.distill.integrity import weights_checksum
from cartridge_distill.model.beginning import first_cartridge
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.packing import pack
from cartridge_distill.model.prefill import prefix_from_tokens
from cartridge_distill.sync.shared_dir import SharedDirectoryPublisher
from cartridge_distill.sync.versions import new_run_id, step_of, version_id
from cartridge_distill.util.errors import ConfigError, SyncError
from tests.tiny import VOCAB, random_cartridge, tiny_model


def equal(a: TrainableCache, b: TrainableCache) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_from_text_takes_the_first_tokens() -> None:
    model = prepare_model(tiny_model())
    ids = torch.randint(3, VOCAB, (50,))
    cartridge = first_cartridge(model, ids, num_tokens=32, num_frozen_tokens=2)
    whole = prefix_from_tokens(model, ids)
    assert (cartridge.num_tokens, cartridge.num_frozen_tokens) == (32, 2)
    for layer, key in enumerate(cartridge.prefix().keys):
        torch.testing.assert_close(key, whole.keys[layer][:, :, :32], atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="50 tokens, the cartridge 64"):
        first_cartridge(model, ids, num_tokens=64)


def test_master_weights_are_float32_on_a_bfloat16_model() -> None:
    model = prepare_model(tiny_model().bfloat16())
    cartridge = first_cartridge(model, torch.arange(3, 35), 16)
    assert {p.dtype for p in cartridge.parameters()} == {torch.float32}
    logits = packed_forward(model, cartridge.prefix(), pack([torch.arange(5, 12)]))
    assert logits.dtype == torch.bfloat16
    logits.float().logsumexp(-1).sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32
        for p in cartridge.trainable_parameters()
    )


def test_only_the_trainable_part_moves() -> None:
    model = prepare_model(tiny_model())
    cartridge = random_cartridge(model, 16)
    before = {name: t.clone() for name, t in cartridge.state_dict().items()}
    checksum = weights_checksum(model)
    optimizer = torch.optim.AdamW(cartridge.trainable_parameters(), lr=0.1)
    packed_forward(model, cartridge.prefix(), pack([torch.arange(5, 12)])).logsumexp(
        -1
    ).sum().backward()
    optimizer.step()
    for name, tensor in cartridge.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("frozen"), name
    assert weights_checksum(model) == checksum
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] += 1e-3
    assert weights_checksum(model) != checksum


def test_random_is_seeded_and_shaped_like_the_model() -> None:
    config = tiny_model().config
    first = TrainableCache.from_random(config, 16, seed=3)
    assert equal(first, TrainableCache.from_random(config, 16, seed=3))
    assert not equal(first, TrainableCache.from_random(config, 16, seed=4))
    assert first.prefix().keys[0].shape == (1, 2, 16, 16)


@pytest.mark.parametrize("frozen", [0, 16, 20])
def test_frozen_counts_that_nobody_can_read_are_refused(frozen: int) -> None:
    prefix = random_cartridge(tiny_model(), 16).prefix()
    with pytest.raises(ConfigError, match="fix: give 1 to 15"):
        TrainableCache.from_prefix(prefix, frozen)


def test_generation_with_transformers_goes_on_after_the_cartridge() -> None:
    """As a transformers Cache: generate() gives what the packed forward predicts, greedily."""
    model = tiny_model()
    cartridge = random_cartridge(model, 16)
    prompt = torch.arange(10, 20)
    cache = cartridge.as_cache()
    # transformers infers positions from the cache; the mask covers cartridge and prompt.
    out = model.generate(
        prompt[None],
        past_key_values=cache,
        attention_mask=torch.ones(1, 26, dtype=torch.long),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
    )[0]
    prepare_model(model)
    with torch.no_grad():
        logits = packed_forward(model, cartridge.prefix(), pack([out]))
    assert logits[9:14].argmax(-1).tolist() == out[10:].tolist()


def test_every_version_has_a_new_id_and_old_ones_go(tmp_path: Path) -> None:
    cartridge = random_cartridge(tiny_model(), 16)
    run = new_run_id("demo")
    assert run != new_run_id("demo")  # an id of an earlier run would be served from memory
    publisher = SharedDirectoryPublisher(tmp_path, "base")
    snapshot = Snapshot.take(cartridge.state_dict(), torch.float32)
    for step in range(4):
        publisher.publish(version_id(run, step), snapshot)
        publisher.retire(keep=2)
    assert sorted(os.listdir(tmp_path)) == [version_id(run, 2), version_id(run, 3)]
    assert step_of(version_id(run, 3)) == 3
    with pytest.raises(SyncError, match="published before"):
        publisher.publish(version_id(run, 3), snapshot)
    with pytest.raises(SyncError, match="no version id"):
        publisher.publish("latest", cartridge)
    with pytest.raises(ConfigError, match="Tokasaurus rewrites"):
        new_run_id("my run")


def test_what_earlier_starts_left_goes_and_nothing_else(tmp_path: Path) -> None:
    snapshot = Snapshot.take(random_cartridge(tiny_model(), 16).state_dict(), torch.float32)
    dead, other = new_run_id("mine"), new_run_id("mine")
    for run, step in ((dead, 3), (dead, 4), (other, 4)):
        SharedDirectoryPublisher(tmp_path, "base").publish(version_id(run, step), snapshot)
    (tmp_path / f".{version_id(dead, 5)}.x1y2z3").mkdir()  # a write that was killed
    (tmp_path / f".{version_id(other, 5)}.x1y2z3").mkdir()
    (tmp_path / "by-hand").mkdir()
    gone = SharedDirectoryPublisher(tmp_path, "base").delete_runs([dead])
    assert gone == [f".{version_id(dead, 5)}.x1y2z3", version_id(dead, 3), version_id(dead, 4)]
    stay = [f".{version_id(other, 5)}.x1y2z3", "by-hand", version_id(other, 4)]
    assert sorted(os.listdir(tmp_path)) == stay
