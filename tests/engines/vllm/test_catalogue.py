"""Cartridges by id: what is served, what is refused, and how two contents are told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cartridge_distill.cartridge.checkpoint import write_cartridge
from cartridge_distill.cartridge.formats.detect import Format
from cartridge_distill.cartridge.formats.stored_cartridge import CartridgeMeta, StoredCartridge
from cartridge_distill.cartridge.kv_shape import KvShape
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.engines.vllm.catalogue import Catalogue, NoCartridge, content_of
from cartridge_distill.engines.vllm.options import Options
from cartridge_distill.engines.vllm.placing import heads_of_rank
from cartridge_distill.engines.vllm.resident import Residents
from cartridge_distill.engines.vllm.wanted import Misused, Wanted

SHAPE = KvShape(2, 2, 4)


def stored(seed: int, tokens: int = 16, shape: KvShape = SHAPE) -> StoredCartridge:
    draw = torch.Generator().manual_seed(seed)
    parts = {
        f"{part}_{side}": [
            torch.randn(1, heads, count, size, generator=draw) for heads, size in shape.layers
        ]
        for part, count in (("frozen", 1), ("trainable", tokens - 1))
        for side in ("keys", "values")
    }
    return StoredCartridge(Snapshot(parts), CartridgeMeta("owner/model"))


def put(folder: Path, name: str, cartridge: StoredCartridge, format: Format = "tokasaurus") -> Path:
    return write_cartridge(cartridge, folder / name, format, overwrite=True)


def by_directory(folder: Path) -> Catalogue:
    return Catalogue(Options(cartridge_dir=folder), SHAPE)


def test_a_version_that_appears_while_serving(tmp_path: Path) -> None:
    catalogue = by_directory(tmp_path)
    with pytest.raises(NoCartridge, match="'v1'.*publish it"):
        catalogue.wanted(["v1"])
    put(tmp_path, "v1", stored(1))
    wanted = catalogue.wanted(["v1"])
    assert wanted == Wanted(("v1",), 16, content_of(stored(1).snapshot))
    keys, values = catalogue.read(wanted)
    want_keys, want_values = stored(1).snapshot.layers()
    for got, want in zip([*keys, *values], [*want_keys, *want_values], strict=True):
        assert torch.equal(got, want)


def test_the_same_content_in_every_format(tmp_path: Path) -> None:
    formats: list[tuple[Format, str]] = [
        ("native", "n"),
        ("tokasaurus", "t"),
        ("hazyresearch", "h.pt"),
    ]
    sources = {format: str(put(tmp_path, name, stored(1), format)) for format, name in formats}
    catalogue = Catalogue(Options(cartridges=sources), SHAPE)
    assert len({catalogue.wanted([name]).content for name in sources}) == 1


def test_another_content_under_the_same_id(tmp_path: Path) -> None:
    catalogue = by_directory(tmp_path)
    put(tmp_path, "v1", stored(1))
    first = catalogue.wanted(["v1"])
    put(tmp_path, "v1", stored(2))
    second = catalogue.wanted(["v1"])
    assert first.content != second.content and first.salt != second.salt
    with pytest.raises(NoCartridge, match="have changed"):
        catalogue.read(first)


def test_a_file_that_was_seen_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = by_directory(tmp_path)
    put(tmp_path, "v1", stored(1))
    first = catalogue.wanted(["v1"])
    monkeypatch.setattr("cartridge_distill.engines.vllm.catalogue.read_local", None)
    assert catalogue.wanted(["v1"]) == first


def test_several_are_joined_by_name(tmp_path: Path) -> None:
    catalogue = by_directory(tmp_path)
    put(tmp_path, "a", stored(1))
    put(tmp_path, "b", stored(2, tokens=32))
    wanted = catalogue.wanted(["b", "a"])
    assert wanted.ids == ("a", "b") and wanted.tokens == 48
    keys, _ = catalogue.read(wanted)
    assert torch.equal(keys[1][:, :, :16], stored(1).snapshot.layers()[0][1])
    assert torch.equal(keys[1][:, :, 16:], stored(2, tokens=32).snapshot.layers()[0][1])
    with pytest.raises(NoCartridge, match="twice"):
        catalogue.wanted(["a", "a"])


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        (KvShape(3, 2, 4), "3 layers"),
        (KvShape(2, 1, 4), "1 kv heads"),
        (KvShape(2, 2, 8), "8 head size"),
    ],
)
def test_a_shape_of_another_model(tmp_path: Path, shape: KvShape, named: str) -> None:
    put(tmp_path, "v1", stored(1, shape=shape))
    with pytest.raises(NoCartridge, match=f"{named}.*another model"):
        by_directory(tmp_path).wanted(["v1"])


def test_what_is_no_cartridge(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "cartridge.pt").write_bytes(b"\x80\x04.")
    (tmp_path / "v1" / "config.yaml").write_text("kv_cache_initializer: {max_tokens: 16}\n")
    with pytest.raises(NoCartridge, match="'v1'"):
        by_directory(tmp_path).wanted(["v1"])


@pytest.mark.parametrize("name", ["../out", "..", "/etc", "a" * 5000, "", "\0"])
def test_ids_reach_nothing_outside(tmp_path: Path, name: str) -> None:
    put(tmp_path, "out", stored(1))
    (tmp_path / "inside").mkdir()
    with pytest.raises(NoCartridge):
        by_directory(tmp_path / "inside").wanted([name])


def test_a_link_out_of_the_directory(tmp_path: Path) -> None:
    put(tmp_path, "out", stored(1))
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "v1").symlink_to(tmp_path / "out")
    with pytest.raises(NoCartridge, match="link"):
        by_directory(tmp_path / "inside").wanted(["v1"])


def test_a_name_that_nobody_gave(tmp_path: Path) -> None:
    catalogue = Catalogue(Options(cartridges={"anna": str(tmp_path)}), SHAPE)
    with pytest.raises(NoCartridge, match="'bert'.*anna"):
        catalogue.wanted(["bert"])


def residents(folder: Path, rank: int, ranks: int, max_bytes: int = 10**9) -> Residents:
    read = by_directory(folder).read
    return Residents(read, torch.device("cpu"), torch.float32, rank, ranks, max_bytes)


def test_ranks_have_the_heads_among_them(tmp_path: Path) -> None:
    put(tmp_path, "v1", stored(1))
    wanted = by_directory(tmp_path).wanted(["v1"])
    want, _ = stored(1).snapshot.layers()
    for rank in range(2):
        kv = residents(tmp_path, rank, 2).get(wanted)
        assert kv.keys[0].shape == (16, 1, 4)
        assert torch.equal(kv.keys[1], want[1][0, heads_of_rank(2, rank, 2)].transpose(0, 1))


def test_a_request_that_says_another_number_of_tokens(tmp_path: Path) -> None:
    put(tmp_path, "v1", stored(1))
    wanted = by_directory(tmp_path).wanted(["v1"])
    kept = residents(tmp_path, 0, 1)
    kept.get(wanted)
    for tokens in (3, 17):  # resident or not
        for one in (kept, residents(tmp_path, 0, 1)):
            with pytest.raises(Misused, match=f"16 tokens, the request says {tokens}"):
                one.get(replace(wanted, tokens=tokens))


def test_the_least_recently_used_goes(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path, f"v{number}", stored(number))
    catalogue = by_directory(tmp_path)
    one, two, three = (catalogue.wanted([f"v{number}"]) for number in range(3))
    size = 16 * SHAPE.numbers * 4
    kept = residents(tmp_path, 0, 1, max_bytes=2 * size)
    first = kept.get(one)
    kept.get(two)
    assert kept.get(one) is first
    kept.get(three)
    assert kept.num_bytes == 2 * size
    assert kept.get(one) is first  # the other one went
    assert residents(tmp_path, 0, 1, max_bytes=1).get(one).num_bytes == size  # one always fits
