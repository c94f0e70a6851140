"""Which weights a cartridge is for: one name for them in any file, another for a twin."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cartridge_distill.model.identity import (
    OtherModel,
    check_same_weights,
    weights_fingerprint,
)
from cartridge_distill.model.weight_files import BLOCK, BLOCKS, places
from cartridge_distill.util.errors import ConfigError
from tests.tiny import tiny_model


def fingerprint(folder: Path) -> str:
    found = weights_fingerprint(folder)
    assert found is not None and found.startswith("weights1:")
    return found


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """In bfloat16's numbers, as models are published; some are too small for float16."""
    made = tiny_model()
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.copy_(parameter.bfloat16())
            parameter.view(-1)[:3] = torch.tensor([0.0, -0.0, 3e-6 * (number + 1)]).bfloat16()
    return made


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights")
    model.save_pretrained(path)
    return path


def test_the_same_weights_in_shards_have_the_same_name(
    model: PreTrainedModel, folder: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert fingerprint(tmp_path) == fingerprint(folder)
    next(tmp_path.glob("*.safetensors")).unlink()
    assert weights_fingerprint(tmp_path) is None


@pytest.mark.parametrize("prefix", ["", "model.", "model.language_model.", "language_model.model."])
def test_a_bin_file_and_the_names_of_other_classes_change_nothing(
    folder: Path, tmp_path: Path, prefix: str
) -> None:
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        name if name.startswith("lm_head") else prefix + name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
    }
    renamed["vision_tower.layers.0.weight"] = torch.ones(4)
    renamed["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    (tmp_path / "config.json").write_text("{}")
    torch.save(renamed, tmp_path / "pytorch_model.bin")
    assert fingerprint(tmp_path) == fingerprint(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_another_dtype_of_the_same_numbers_changes_nothing(
    folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t.to(dtype) for name, t in tensors.items()}, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) == fingerprint(folder)


def test_tied_embeddings_may_be_saved_once_or_twice(tmp_path: Path) -> None:
    embeddings = torch.randn(32, 8)
    for name, more in (("once", {}), ("twice", {"lm_head.weight": embeddings.clone()})):
        (tmp_path / name).mkdir()
        save_file({"embed_tokens.weight": embeddings} | more, tmp_path / name / "model.safetensors")
    assert fingerprint(tmp_path / "once") == fingerprint(tmp_path / "twice")


@pytest.mark.parametrize(
    "change", ["seed", "one tensor", "two exchanged", "reshaped", "its last number"]
)
def test_other_weights_have_another_name(folder: Path, tmp_path: Path, change: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    query, other = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    if change == "seed":
        tensors = {name: t + 0.01 * torch.randn_like(t) for name, t in tensors.items()}
    elif change == "one tensor":  # as when an adapter was merged
        tensors[query] = tensors[query] * 1.01
    elif change == "two exchanged":
        tensors[query], tensors[other] = tensors[other], tensors[query]
    elif change == "reshaped":
        tensors[query] = tensors[query].reshape(-1, 2)
    else:
        tensors[query].view(-1)[-1] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != fingerprint(folder)


def test_a_large_tensor_is_looked_at_from_its_first_number_to_its_last() -> None:
    for count in (0, 1, BLOCKS * BLOCK, BLOCKS * BLOCK + 1, 10_000_019):
        found = places(count)
        inside = [n for start, stop in found for n in (start, stop - 1)]
        assert inside == sorted(inside) and (not count or (inside[0], inside[-1]) == (0, count - 1))
        assert sum(stop - start for start, stop in found) == min(count, BLOCKS * BLOCK)


def test_what_is_not_there_or_broken(folder: Path, tmp_path: Path) -> None:
    assert weights_fingerprint(tmp_path) is None
    assert weights_fingerprint("owner/not-downloaded") is None
    whole = (folder / "model.safetensors").read_bytes()
    for part in (b"", whole[:4], whole[:100], whole[:-9], b"\xff" * 100):
        (tmp_path / "model.safetensors").write_bytes(part)
        with pytest.raises(ConfigError, match="weights cannot be read"):
            weights_fingerprint(tmp_path)


def test_a_hub_id_is_looked_up_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def cached(repository: str, name: str, revision: str | None) -> str | None:
        assert (repository, revision) == ("owner/name", "abc")
        return str(folder / name) if (folder / name).is_file() else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.chdir(tmp_path)
    assert weights_fingerprint("owner/name", "abc") == fingerprint(folder)


def test_a_cartridge_of_a_twin_is_refused_by_name(folder: Path) -> None:
    def meta(name: str | None) -> SimpleNamespace:
        return SimpleNamespace(base_model="owner/its-own", model_fingerprint=name)

    model, own = str(folder), fingerprint(folder)
    assert check_same_weights(meta(own), "c", model) is None
    twin = meta("weights1:" + "0" * 32)
    with pytest.raises(OtherModel, match=r"other weights.*owner/its-own.*--allow-other-model"):
        check_same_weights(twin, "c", model)
    allowed = check_same_weights(twin, "c", model, allow_other=True)
    assert allowed is not None and own in allowed and "mean nothing" in allowed
    unknown = check_same_weights(meta(None), "c", model)
    assert unknown is not None and "does not say" in unknown
    later = check_same_weights(meta("weights2:" + "0" * 32), "c", model)
    assert later is not None and "another kind" in later
    absent = check_same_weights(meta(own), "c", "owner/not-downloaded")
    assert absent is not None and "not on this machine" in absent


def test_an_index_that_names_no_file_is_as_none(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_fingerprint(tmp_path) is None
