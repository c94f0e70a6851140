"""Files of every origin: what is read, and what is refused with which reason."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cartridge_distill.cartridge.checkpoint import (
    CartridgeMeta,
    load_cartridge,
    load_pt,
    load_pt_prefix,
    read_cartridge,
    read_meta,
    save_cartridge,
    write_cartridge,
    write_tokasaurus,
)
from cartridge_distill.cartridge.formats.detect import Format, find
from cartridge_distill.cartridge.snapshot import PARTS
from cartridge_distill.util.errors import CartridgeFormatError
from tests.cartridge.formats.made import META, same_bits, stored
from tests.tiny import random_cartridge, tiny_model


def upstream_file(path: Path, spelling: str, wrap: type, frozen: int, dtype: torch.dtype) -> None:
    """As HazyResearch's training saves: this order of keys, parameters, the frozen ones fixed."""

    def part(kind: str, name: str) -> Any:
        tensors = made.snapshot.parts[f"{kind}_{name}"]
        if wrap is list:
            return list(tensors)
        return nn.ParameterList(
            [nn.Parameter(t.clone(), requires_grad=kind == "trainable") for t in tensors]
        )

    made = stored(frozen=frozen, dtype=dtype)
    data = {
        "trainable_keys": part("trainable", "keys"),
        "trainable_values": part("trainable", "values"),
        f"{spelling}_keys": part("frozen", "keys"),
        f"{spelling}_values": part("frozen", "values"),
    }
    torch.save(data, path)


@pytest.mark.parametrize("spelling", ["fixed", "frozen"])
@pytest.mark.parametrize("wrap", [list, nn.ParameterList], ids=["lists", "ParameterList"])
@pytest.mark.parametrize("frozen", [1, 2, 8, 31])
def test_upstream_files(tmp_path: Path, spelling: str, wrap: type, frozen: int) -> None:
    """Two kv heads: a reader that takes the frozen count from the heads' axis finds 2 of any."""
    file = tmp_path / "cache-step4092.pt"
    upstream_file(file, spelling, wrap, frozen, torch.bfloat16)
    found = read_cartridge(file)
    assert same_bits(found, stored(frozen=frozen, dtype=torch.bfloat16))
    assert found.meta == CartridgeMeta(None)
    assert load_pt(file).num_frozen_tokens == load_cartridge(tmp_path).num_frozen_tokens == frozen
    prefix = load_pt_prefix(file)
    assert (prefix.keys[0].dtype, prefix.num_tokens) == (torch.bfloat16, 32)


def test_a_folder_of_upstreams_training(tmp_path: Path) -> None:
    """Several steps lie there, and a configuration as Weights & Biases writes it."""
    for step, frozen in ((512, 1), (4092, 2), (96, 3)):
        file = tmp_path / f"cache-step{step}.pt"
        upstream_file(file, "fixed", nn.ParameterList, frozen, torch.bfloat16)
    config = {"model": {"desc": None, "value": {"pretrained_model_name_or_path": "owner/base"}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    found = read_cartridge(tmp_path)
    assert (found.snapshot.num_frozen_tokens, found.meta.base_model) == (2, "owner/base")
    (tmp_path / "other.pt").write_bytes(b"")
    with pytest.raises(CartridgeFormatError, match="several .pt files.*name the one"):
        read_cartridge(tmp_path)


@pytest.mark.parametrize("how", ["empty lists", "no tokens", "no key"])
def test_no_frozen_token(tmp_path: Path, how: str) -> None:
    parts: dict[str, Any] = dict(stored().snapshot.parts)
    for name in ("frozen_keys", "frozen_values"):
        if how == "no key":
            del parts[name]
        else:
            parts[name] = [] if how == "empty lists" else [t[:, :, :0] for t in parts[name]]
    torch.save(parts, tmp_path / "a.pt")
    with pytest.raises(CartridgeFormatError, match="no frozen token.*Tokasaurus.*num_frozen_token"):
        load_cartridge(tmp_path / "a.pt")


class _Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_a_hostile_pickle_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    hostile = _Hostile(mark)
    torch.save({"frozen_keys": hostile}, tmp_path / "dict.pt")
    torch.save({"frozen_keys": hostile}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(hostile))
    inside = nn.ParameterList([torch.zeros(1, 2, 1, 16)])
    inside.__dict__["hostile"] = hostile  # within the state of the one class that is allowed
    torch.save({name: inside for name in PARTS}, tmp_path / "inside.pt")
    for name in ("dict", "old", "plain", "inside"):
        with pytest.raises(CartridgeFormatError, match="cannot be read safely"):
            load_cartridge(tmp_path / f"{name}.pt")
    write_cartridge(stored(), tmp_path / "toka", "tokasaurus")
    (tmp_path / "toka" / "config.yaml").write_text(
        f"model: !!python/object/apply:os.system ['touch {mark}']"
    )
    with pytest.raises(CartridgeFormatError, match="config.yaml cannot be read"):
        load_cartridge(tmp_path / "toka")
    assert not mark.exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert mark.exists()  # the test's own pickle does what it says


def test_a_list_with_made_up_state(tmp_path: Path) -> None:
    """A ParameterList's state comes from the file; its length is not to be believed."""
    tensors = stored().snapshot.parts["trainable_keys"]
    long = nn.ParameterList(tensors)
    long.__dict__["_size"] = 10**12
    odd = nn.ParameterList(tensors)
    odd._parameters["1"] = "no tensor"  # type: ignore[assignment]
    for number, wrong in enumerate((long, odd)):
        torch.save(dict.fromkeys(PARTS, wrong), tmp_path / f"{number}.pt")
    assert load_cartridge(tmp_path / "0.pt").num_layers == 2
    with pytest.raises(CartridgeFormatError, match="must be a list of"):
        load_cartridge(tmp_path / "1.pt")


def test_damaged_files_are_refused_or_whole(tmp_path: Path) -> None:
    """Whatever bytes change: a cartridge, or the one error."""
    upstream_file(tmp_path / "good.pt", "fixed", nn.ParameterList, 1, torch.bfloat16)
    good = (tmp_path / "good.pt").read_bytes()
    draw = random.Random(0)
    for number in range(80):
        bad = bytearray(good)
        for _ in range(4):
            bad[draw.randrange(3000)] = draw.randrange(256)  # the pickle lies in front
        if number % 4 == 0:
            del bad[draw.randrange(len(bad)) :]
        (tmp_path / "bad.pt").write_bytes(bad)
        try:
            load_cartridge(tmp_path / "bad.pt")
        except CartridgeFormatError:
            pass


def test_files_that_are_no_cartridge_say_why(tmp_path: Path) -> None:
    def refused(data: object, match: str) -> None:
        torch.save(data, tmp_path / "a.pt")
        with pytest.raises(CartridgeFormatError, match=match):
            load_pt(tmp_path / "a.pt")

    def changed(name: str, layer: int, tensor: Tensor) -> dict[str, list[Tensor]]:
        parts = {part: list(tensors) for part, tensors in stored().snapshot.parts.items()}
        parts[name][layer] = tensor
        return parts

    refused({"keys": []}, "neither fixed_keys nor frozen_keys")
    refused([1], "holds a list, expected a dict")
    refused({"frozen_keys": [torch.zeros(1)]}, "lacks .*trainable_keys")
    refused(dict.fromkeys(PARTS, 3), "is a int, not a list")
    refused(changed("frozen_keys", 0, torch.zeros(3)), r"frozen_keys must be a list of \[1, H")
    refused(changed("trainable_values", 1, torch.full((1, 2, 31, 16), torch.nan)), "values.1 holds")
    refused(changed("trainable_keys", 1, torch.zeros(1, 2, 30, 16)), r"layer 1 .*\(1, 2, 30, 16\)")
    refused(changed("frozen_keys", 0, torch.zeros(1, 2, 1, 16).double()), "torch.float64")
    empty = changed("frozen_keys", 0, torch.zeros(1, 2, 1, 16))
    empty["trainable_values"] = [t[:, :, :0] for t in empty["trainable_values"]]
    refused(empty, "all its tokens are frozen")
    with pytest.raises(CartridgeFormatError, match="no file, no directory and no hub id"):
        load_cartridge(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CartridgeFormatError, match="holds no cartridge"):
        load_cartridge(tmp_path / "empty")


def test_tensors_of_several_dtypes_lose_nothing(tmp_path: Path) -> None:
    parts = {name: list(tensors) for name, tensors in stored().snapshot.parts.items()}
    parts["frozen_keys"] = [t.bfloat16() for t in parts["frozen_keys"]]
    torch.save(parts, tmp_path / "a.pt")
    snapshot = read_cartridge(tmp_path / "a.pt").snapshot
    assert snapshot.dtype == torch.float32
    assert torch.equal(snapshot.parts["trainable_keys"][1], parts["trainable_keys"][1])


def test_our_directory(tmp_path: Path) -> None:
    cartridge = random_cartridge(tiny_model(), 16)
    path = save_cartridge(cartridge, tmp_path / "c", META)
    loaded, state = load_cartridge(path), cartridge.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert read_cartridge(path).meta == META == read_cartridge(path / "cartridge.safetensors").meta
    about = read_meta(path)
    assert (about["step"], about["num_tokens"], about["dtype"]) == (7, 16, "float32")
    save_cartridge(cartridge, path, CartridgeMeta("base", step=8))  # replaces, atomically
    assert read_meta(path)["step"] == 8
    assert os.listdir(tmp_path) == ["c"]


def test_our_directory_when_its_parts_disagree(tmp_path: Path) -> None:
    path = write_cartridge(stored(), tmp_path / "c", "native")
    about, json_file = read_meta(path), path / "cartridge.json"

    def refused(match: str) -> None:
        with pytest.raises(CartridgeFormatError, match=match):
            load_cartridge(path)

    json_file.write_text(json.dumps(about | {"num_tokens": 48}))
    refused("num_tokens=48, cartridge.safetensors has 32")
    json_file.write_text(json.dumps(about | {"recipe": None}))
    refused("cartridge.json: recipe is None, expected dict")
    json_file.write_text(json.dumps(about | {"format": "cartridge-distill/9"}))
    refused("does not say format=")
    json_file.write_text(json.dumps(about))
    tensors = load_file(path / "cartridge.safetensors")
    save_file(tensors | {"frozen_keys.7": torch.zeros(1)}, path / "cartridge.safetensors")
    refused("missing or unknown: frozen_keys.7")
    (path / "cartridge.safetensors").write_bytes(b"x" * 20)
    refused("cannot be read")


@pytest.mark.parametrize("key", ["valid_lengths", "trainable_betas"])
def test_keys_that_are_not_known_are_refused_by_name(tmp_path: Path, key: str) -> None:
    """Whoever leaves them out reads another cartridge, such as one whose padding is attended to."""
    lengths = [20, 32]

    def refused(path: Path) -> None:
        with pytest.raises(CartridgeFormatError, match=f"not known here: {key}\\."):
            load_cartridge(path)

    file = write_cartridge(stored(), tmp_path / "a.pt", "hazyresearch")
    torch.save(torch.load(file) | {key: lengths}, file)
    refused(file)
    with pytest.raises(CartridgeFormatError, match=f"not known here: {key}"):
        load_pt_prefix(file)  # as the server reads it

    native = write_cartridge(stored(), tmp_path / "native", "native")
    about, tensors = read_meta(native), load_file(native / "cartridge.safetensors")
    (native / "cartridge.json").write_text(json.dumps(about | {key: lengths}))
    refused(native)
    (native / "cartridge.json").write_text(json.dumps(about))
    save_file(tensors, native / "cartridge.safetensors", metadata={key: "20 32"})
    refused(native)
    save_file(tensors, native / "cartridge.safetensors", metadata={"format": "pt"})
    assert same_bits(read_cartridge(native), stored())

    peft = write_cartridge(stored(), tmp_path / "peft", "peft")
    config = json.loads((peft / "adapter_config.json").read_text())
    (peft / "adapter_config.json").write_text(json.dumps(config | {key: lengths}))
    refused(peft)
    (peft / "adapter_config.json").write_text(json.dumps(config | {key: None}))
    assert same_bits(read_cartridge(peft), stored())  # not in use, as newer versions write it
    (peft / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["head"]}))
    with pytest.raises(CartridgeFormatError, match="modules_to_save is .'head'."):
        load_cartridge(peft)

    toka = write_cartridge(stored(), tmp_path / "toka", "tokasaurus")
    settings = yaml.safe_load((toka / "config.yaml").read_text())
    (toka / "config.yaml").write_text(yaml.safe_dump(settings | {key: lengths}))
    refused(toka)
    (toka / "config.yaml").write_text(yaml.safe_dump(settings | {"lr": 0.02, "seed": 1}))
    assert same_bits(read_cartridge(toka), stored())  # the settings of a training


def test_two_spellings_in_one_file_must_agree(tmp_path: Path) -> None:
    file = write_cartridge(stored(), tmp_path / "a.pt", "hazyresearch")
    data = torch.load(file)
    data["fixed_values"] = [tensor + 1 for tensor in data["fixed_values"]]
    torch.save(data, file)
    with pytest.raises(CartridgeFormatError, match="frozen_values and fixed_values differ"):
        load_cartridge(file)
    del data["fixed_values"]
    torch.save(data, file)
    with pytest.raises(CartridgeFormatError, match="lacks .'fixed_values'"):
        load_cartridge(file)


@pytest.mark.parametrize("format", ["native", "peft", "tokasaurus", "hazyresearch"])
def test_a_git_lfs_pointer_is_called_one(tmp_path: Path, format: Format) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 99\n"
    path = write_cartridge(stored(), tmp_path / "a.pt", format)
    weights = [path] if path.is_file() else [f for f in path.iterdir() if f.suffix[1] in "sp"]
    assert len(weights) == 1
    weights[0].write_text(pointer)
    with pytest.raises(CartridgeFormatError, match="Git LFS pointer.*git lfs pull"):
        load_cartridge(path)


def test_a_tokasaurus_directory_never_changes(tmp_path: Path) -> None:
    cartridge = random_cartridge(tiny_model(), 16)
    write_tokasaurus(cartridge, tmp_path / "v", "base")
    found = read_cartridge(tmp_path / "v")
    assert (found.snapshot.dtype, found.meta.base_model) == (torch.bfloat16, "base")
    with pytest.raises(FileExistsError):
        write_tokasaurus(cartridge, tmp_path / "v", "base")
    (tmp_path / "v" / "config.yaml").write_text("kv_cache_initializer: {max_tokens: 32}")
    with pytest.raises(CartridgeFormatError, match="max_tokens=32.* holds 16"):
        load_cartridge(tmp_path / "v")
    (tmp_path / "v" / "config.yaml").unlink()
    with pytest.raises(CartridgeFormatError, match="config.yaml is missing"):
        load_cartridge(tmp_path / "v")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "has 2 layers, the model .* has 3"),
        ({"num_key_value_heads": 4}, "has 2 kv heads, the model .* has 4"),
        ({"head_dim": 32}, "has 16 head size, the model .* has 32"),
    ],
)
def test_the_wrong_model_is_told_by_the_number(
    tmp_path: Path, change: dict[str, int], message: str
) -> None:
    config = tiny_model().config
    for format, name in (
        ("native", "a"),
        ("peft", "b"),
        ("tokasaurus", "c"),
        ("hazyresearch", "d.pt"),
    ):
        path = write_cartridge(stored(), tmp_path / name, format)  # type: ignore[arg-type]
        assert load_cartridge(path, config).num_tokens == 32
        for key, value in change.items():
            setattr(config, key, value)
        with pytest.raises(CartridgeFormatError, match=message):
            load_cartridge(path, config)
        config = tiny_model().config


def test_the_formats_need_no_model_library() -> None:
    """The gateway runs where transformers may be of another age; it writes with these."""
    code = (
        "import sys; sys.modules['transformers'] = None; "
        "import cartridge_distill.cartridge.formats.detect, cartridge_distill.cartridge.hub, "
        "cartridge_distill.cartridge.compose"
    )
    project = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", code], cwd=project, check=True)


def test_the_best_of_several_formats_is_found() -> None:
    own = ["cartridge.safetensors", "cartridge.json"]
    peft = ["adapter_model.safetensors", "adapter_config.json"]
    toka = ["cartridge.pt", "config.yaml"]
    assert find([*toka, *peft, *own, "README.md"]) == ("native", tuple(own))
    assert find([*toka, *peft]) == ("peft", tuple(peft))
    assert find(toka) == ("tokasaurus", tuple(toka))
    assert find(["cache-step9.pt", "cache-step10.pt"]) == ("hazyresearch", ("cache-step10.pt",))
    assert find(["checkpoints/cartridge.safetensors", "README.md"]) is None
