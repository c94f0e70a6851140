"""The wire format of a version, against the safetensors library and against bad files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cartridge_distill.cartridge.checkpoint import load_cartridge
from cartridge_distill.cartridge.formats.tokasaurus import write_snapshot
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.sync.upload import encode, read_head
from cartridge_distill.util.errors import CartridgeFormatError
from tests.tiny import random_cartridge, tiny_model


def taken(dtype: torch.dtype = torch.bfloat16, tokens: int = 16) -> Snapshot:
    cartridge = random_cartridge(tiny_model("gemma3"), tokens)
    return Snapshot.take(cartridge.state_dict(), dtype)


def file_of(snapshot: Snapshot) -> bytes:
    return b"".join(bytes(chunk) for chunk in encode(snapshot, "base", 7).chunks(1000))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_the_safetensors_library_reads_what_is_sent(tmp_path: Path, dtype: torch.dtype) -> None:
    snapshot = taken(dtype)
    upload = encode(snapshot, "base", 7)
    data = file_of(snapshot)
    assert len(data) == upload.num_bytes
    path = tmp_path / "v.safetensors"
    path.write_bytes(data)
    with safe_open(path, "pt") as file:
        assert file.metadata()["step"] == "7"
        for name, tensor in snapshot.items():
            assert torch.equal(file.get_tensor(name), tensor)
    found = read_head(data)
    assert found is not None
    assert (found.header, found.num_bytes) == (upload.header, len(upload.head))
    assert len(data) - found.num_bytes == found.header.data_bytes
    for name, tensor in snapshot.items():
        start = found.num_bytes + found.starts[name]
        assert data[start : start + tensor.nbytes] == tensor.view(torch.uint8).numpy().tobytes()


def test_what_the_safetensors_library_writes_is_accepted(tmp_path: Path) -> None:
    snapshot = taken()
    metadata = {name: str(value) for name, value in encode(snapshot, "base", 7).header}
    save_file(dict(snapshot.items()), tmp_path / "v.safetensors", metadata)
    found = read_head((tmp_path / "v.safetensors").read_bytes())
    assert found is not None and found.header.num_tokens == 16


def test_a_head_is_read_when_it_is_complete_and_not_before() -> None:
    data = file_of(taken())
    (length,) = struct.unpack("<Q", data[:8])
    for cut in (0, 7, 8, 100, 8 + length - 1):
        assert read_head(data[:cut]) is None
    assert read_head(data[: 8 + length]) is not None


def edited(change: Any) -> bytes:
    """The file's header after ``change(entries)``."""
    data = file_of(taken())
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e.pop("__metadata__"), "no metadata"),
        (lambda e: e["__metadata__"].pop("sha256"), "metadata sha256"),
        (lambda e: e["__metadata__"].update(step="-1"), "metadata step"),
        (lambda e: e["__metadata__"].update(num_tokens="9" * 30), "metadata num_tokens"),
        (lambda e: e["__metadata__"].update(num_frozen_tokens="16"), "one trained token"),
        (lambda e: e["__metadata__"].update(num_layers="3"), "12 tensors, the file has 8"),
        (lambda e: e["__metadata__"].update(dtype="int8"), "metadata dtype"),
        (lambda e: e["__metadata__"].update(dtype="float16"), "the metadata says F16"),
        (lambda e: e["__metadata__"].update(surprise="1"), "metadata surprise"),
        (lambda e: e.update({"valid_lengths": e["frozen_keys.0"]}), "not known: valid_lengths"),
        (lambda e: e["frozen_keys.1"].update(valid=3), "frozen_keys.1: unknown valid"),
        (lambda e: e.update({"frozen_keys.9": e.pop("frozen_keys.0")}), "frozen_keys.0 is missing"),
        (lambda e: e["frozen_keys.0"].update(shape=[1, 2, 2, 16]), "frozen_keys.0 is BF16"),
        (lambda e: e["frozen_keys.0"].update(data_offsets=[0, 4]), "data_offsets"),
        (lambda e: e["frozen_keys.0"].update(data_offsets="x"), "data_offsets"),
        (
            lambda e: e["frozen_keys.1"].update(data_offsets=e["frozen_keys.0"]["data_offsets"]),
            "gap or overlap",
        ),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(change: Any, words: str) -> None:
    with pytest.raises(CartridgeFormatError, match=words):
        read_head(edited(change))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"PK\x03\x04" + bytes(60), "pickled files are never accepted"),
        (b"\x80\x04\x95" + bytes(60), "pickled files are never accepted"),
        (b"\xff" * 100, "no safetensors file"),
        (bytes(100), "no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
        (struct.pack("<Q", 4) + b"[1] ", "no metadata"),
        (struct.pack("<Q", 4) + b"{{{{", "not JSON"),
        (struct.pack("<Q", 2000) + b"[" * 2000, "not JSON"),
    ],
)
def test_other_files_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(CartridgeFormatError, match=words):
        read_head(data)


def test_a_snapshot_of_something_else_is_refused() -> None:
    state = random_cartridge(tiny_model(), 16).state_dict()
    with pytest.raises(CartridgeFormatError, match="embed"):
        Snapshot.take({**state, "model.embed.weight": torch.zeros(2)}, torch.float32)
    with pytest.raises(CartridgeFormatError, match="frozen"):
        Snapshot.take({k: v for k, v in state.items() if "frozen" not in k}, torch.float32)
    del state["trainable_keys.0"]
    with pytest.raises(CartridgeFormatError, match="numbered"):
        Snapshot.take(state, torch.float32)


def test_the_directory_of_a_snapshot_is_read_back(tmp_path: Path) -> None:
    snapshot = taken()
    write_snapshot(snapshot, tmp_path / "v", "base", {"more.json": "{}"})
    assert sorted(p.name for p in (tmp_path / "v").iterdir()) == [
        *("cartridge.pt", "config.yaml", "more.json")
    ]
    back = load_cartridge(tmp_path / "v")
    assert torch.equal(back.trainable_keys[1].bfloat16(), snapshot.parts["trainable_keys"][1])
    with pytest.raises(FileExistsError):
        write_snapshot(snapshot, tmp_path / "v", "base")
    assert [p.name for p in tmp_path.iterdir()] == ["v"]  # and nothing half-written beside it
