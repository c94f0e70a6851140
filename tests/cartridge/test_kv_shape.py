"""Layers of different shape, and layers without keys and values of their own, end to end."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from cartridge_distill.cartridge.checkpoint import read_cartridge
from cartridge_distill.cartridge.formats.detect import FORMATS, write_local
from cartridge_distill.cartridge.formats.stored_cartridge import CartridgeMeta, StoredCartridge
from cartridge_distill.cartridge.kv_shape import KvShape, check_fits, kv_sources
from cartridge_distill.cartridge.snapshot import PARTS, Snapshot
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.gateway.model_shape import ModelShape
from cartridge_distill.sync.upload import encode, read_head
from cartridge_distill.util.errors import CartridgeFormatError, ConfigError
from tests.architectures import VARIANTS, known, tiny_config
from tests.tiny import tiny_model

pytestmark = pytest.mark.skipif(
    not known("gemma4_text"), reason="this transformers has no layers that differ"
)

GEMMA4 = KvShape(4, (2, 1, 2, 1), (16, 32, 16, 32))


def gemma4() -> Any:
    kind, extra = VARIANTS["gemma4_text, keys that are values"]
    return tiny_config(kind, **extra)


def snapshot() -> Snapshot:
    cartridge = TrainableCache.from_random(gemma4(), 16, std=1.0)
    return Snapshot.take(cartridge.state_dict(), torch.float32)


def test_the_shape_of_each_layer_is_the_models() -> None:
    """Six layers, of which two read the keys and values of the last of their kind before them."""
    assert KvShape.of(gemma4()) == GEMMA4 == snapshot().kv_shape
    assert kv_sources(gemma4()) == (0, 1, 2, 3, 2, 3)
    assert GEMMA4.layers == [(2, 16), (1, 32), (2, 16), (1, 32)]
    assert GEMMA4.numbers == 2 * (32 + 32 + 32 + 32)
    assert kv_sources(tiny_model().config) == (0, 1)


def test_layers_that_agree_have_one_number() -> None:
    assert KvShape(2, (2, 2), (16, 16)) == KvShape(2, 2, 16) == KvShape.of(tiny_model().config)
    with pytest.raises(CartridgeFormatError, match="kv_heads has 3 numbers for 2 layers"):
        KvShape(2, (2, 1, 2), 16)


def test_a_layer_that_differs_is_named() -> None:
    check_fits(GEMMA4, gemma4())
    with pytest.raises(CartridgeFormatError, match=r"has 16 head size, .* has \(16, 32, 16, 32\)"):
        check_fits(KvShape(4, (2, 1, 2, 1), 16), gemma4())


@pytest.mark.parametrize(
    ("kind", "extra", "says"),
    [
        ("deepseek_v2", {}, "kv_lora_rank=16, so that keys and values of a layer differ in size"),
        ("youtu", {}, "youtu: kv_lora_rank=16"),
        ("rwkv", {}, "num_attention_heads=None"),
        (
            "gemma4_text",
            {
                "num_kv_shared_layers": 2,
                "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2,
            },
            "none of the others is a full_attention layer",
        ),
    ],
)
def test_what_has_no_such_shape_is_refused(kind: str, extra: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        KvShape.of(tiny_config(kind, **extra))


@pytest.mark.parametrize("format", FORMATS)
def test_files_keep_it_or_refuse_it(format: Any, tmp_path: Path) -> None:
    stored = StoredCartridge(snapshot(), CartridgeMeta(base_model="tiny"))
    target = tmp_path / ("c.pt" if format == "hazyresearch" else "c")
    if format == "peft":  # one shape for all layers
        with pytest.raises(CartridgeFormatError, match="layers differ in heads or head size"):
            write_local(stored, target, format)
        return
    write_local(stored, target, format)
    read = read_cartridge(target, gemma4())
    assert read.snapshot.kv_shape == GEMMA4
    for (_, one), (_, other) in zip(read.snapshot.items(), snapshot().items(), strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), atol=0, rtol=0)


def test_a_layer_whose_values_have_another_size_is_no_cartridge() -> None:
    parts = {name: [*snapshot().parts[name]] for name in PARTS}
    parts["trainable_values"][1] = parts["trainable_values"][1][..., :8]
    with pytest.raises(CartridgeFormatError, match=r"layer 1 of trainable_values .* \(1, 1, 15,"):
        Snapshot(parts)


def test_an_upload_says_the_numbers_of_each_layer() -> None:
    upload = encode(snapshot(), "base", 7)
    data = b"".join(bytes(chunk) for chunk in upload.chunks())
    found = read_head(data)
    assert found is not None and found.header == upload.header and found.header.kv == GEMMA4
    assert len(data) - found.num_bytes == found.header.data_bytes
    (length,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    assert (metadata["kv_heads"], metadata["head_dim"]) == ("2,1,2,1", "16,32,16,32")
    shape = ModelShape("base", KvShape.of(gemma4()))
    shape.check(found.header, 64)
    assert shape.max_upload_bytes(16) >= len(data)
    with pytest.raises(CartridgeFormatError, match=r"head_dim=\(16, 32, 16, 32\), .* has 16"):
        ModelShape("base", KvShape(4, (2, 1, 2, 1), 16)).check(found.header, 64)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("kv_heads", "2,1,2", "kv_heads has 3 numbers, num_layers=4"),
        ("head_dim", "16,32,16,0", "metadata head_dim"),
        ("head_dim", "16,32,,16", "metadata head_dim"),
        ("head_dim", "16,32,16,33", "the metadata says"),
    ],
)
def test_an_upload_with_wrong_numbers_is_refused(name: str, value: str, says: str) -> None:
    data = b"".join(bytes(chunk) for chunk in encode(snapshot(), "base", 7).chunks())
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    entries["__metadata__"][name] = value
    text = json.dumps(entries).encode()
    with pytest.raises(CartridgeFormatError, match=says):
        read_head(struct.pack("<Q", len(text)) + text + data[8 + length :])
