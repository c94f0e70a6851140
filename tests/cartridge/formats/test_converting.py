"""From every format to every other: no bit changes, nothing is half-written."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from cartridge_distill.cartridge import checkpoint
from cartridge_distill.cartridge.checkpoint import (
    FORMATS,
    Format,
    convert,
    read_cartridge,
    write_cartridge,
)
from cartridge_distill.cartridge.content_hash import HASHES
from cartridge_distill.cartridge.formats import native
from cartridge_distill.util import files
from cartridge_distill.util.errors import CartridgeFormatError, ConfigError
from tests.cartridge.formats.made import META, same_bits, stored

PAIRS = list(itertools.product(FORMATS, FORMATS))


def place(folder: Path, name: str, format: Format) -> Path:
    return folder / (f"{name}.pt" if format == "hazyresearch" else name)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_pair_keeps_every_bit(tmp_path: Path, first: Format, second: Format) -> None:
    cases = ((torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 31))
    for number, (dtype, frozen) in enumerate(cases):
        made = stored(frozen=frozen, dtype=dtype)
        source = write_cartridge(made, place(tmp_path, f"{number}-a", first), first)
        target = place(tmp_path, f"{number}-b", second)
        convert(source, target, second, base_model=META.base_model)
        again = convert(target, place(tmp_path, f"{number}-c", first), first, base_model="x")
        assert same_bits(read_cartridge(target), made)
        assert same_bits(read_cartridge(again), made)


def test_what_is_known_goes_as_far_as_the_format_holds_it(tmp_path: Path) -> None:
    source = write_cartridge(stored(), tmp_path / "native", "native")
    assert read_cartridge(convert(source, tmp_path / "native2", "native")).meta == META
    meta = read_cartridge(convert(source, tmp_path / "peft", "peft")).meta
    assert (meta.base_model, meta.base_revision, meta.step) == ("owner/tiny", "c0ffee", 0)
    meta = read_cartridge(convert(source, tmp_path / "toka", "tokasaurus")).meta
    assert (meta.base_model, meta.base_revision) == ("owner/tiny", None)
    named = convert(source, tmp_path / "named", "native", base_model="owner/other")
    meta = read_cartridge(named).meta
    assert (meta.base_model, meta.base_revision, meta.step) == ("owner/other", None, 7)


@pytest.mark.parametrize("format", ["native", "tokasaurus", "peft"])
def test_a_pt_file_does_not_say_its_model(tmp_path: Path, format: Format) -> None:
    source = write_cartridge(stored(), tmp_path / "a.pt", "hazyresearch")
    with pytest.raises(CartridgeFormatError, match="which model.*base_model"):
        convert(source, tmp_path / "b", format)
    assert os.listdir(tmp_path) == ["a.pt"]
    convert(source, tmp_path / "b", format, base_model="owner/tiny")
    assert read_cartridge(tmp_path / "b").meta.base_model == "owner/tiny"


@pytest.mark.parametrize("frozen_is_called", ["fixed", "frozen"])
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_written_pt_is_read_by_upstream_of_either_age(
    tmp_path: Path, frozen_is_called: str, weights_only: bool
) -> None:
    """Older readers ask for one spelling, newer ones for the other; both then make parameters."""
    made = stored(frozen=2, dtype=torch.bfloat16)
    path = write_cartridge(made, tmp_path / "a.pt", "hazyresearch")
    data = torch.load(path, weights_only=weights_only)  # the test has just written it
    for ours, mine in made.snapshot.parts.items():
        theirs = data[ours.replace("frozen", frozen_is_called)]
        assert len(theirs) == made.snapshot.num_layers
        for one, other in zip(mine, theirs, strict=True):
            assert other.dtype == torch.bfloat16 and torch.equal(other, one)
            assert torch.equal(nn.Parameter(other), one) and other.is_contiguous()


def test_the_second_spelling_costs_no_tensor(tmp_path: Path) -> None:
    made = stored(tokens=64, frozen=32)
    path = write_cartridge(made, tmp_path / "a.pt", "hazyresearch")
    assert made.snapshot.num_bytes < path.stat().st_size < 1.2 * made.snapshot.num_bytes
    assert same_bits(read_cartridge(path), made)


def test_a_tokasaurus_directory_is_plain_lists(tmp_path: Path) -> None:
    path = write_cartridge(stored(), tmp_path / "a", "tokasaurus")
    data = torch.load(path / "cartridge.pt", weights_only=True)
    assert {type(tensors) for tensors in data.values()} == {list}


def test_another_dtype(tmp_path: Path) -> None:
    source = write_cartridge(stored(), tmp_path / "a", "native")
    half = convert(source, tmp_path / "b", "tokasaurus", dtype=torch.bfloat16)
    assert same_bits(read_cartridge(half), stored().to(torch.bfloat16))
    large = stored()
    large.snapshot.parts["trainable_keys"][1][0, 0, 0, 0] = 1e5
    source = write_cartridge(large, tmp_path / "large", "native")
    with pytest.raises(CartridgeFormatError, match="too large for torch.float16: trainable_keys.1"):
        convert(source, tmp_path / "c", "native", dtype=torch.float16)
    with pytest.raises(ConfigError, match="float32, bfloat16 or float16"):
        convert(source, tmp_path / "c", "native", dtype=torch.int8)


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    odd = write_cartridge(stored(tokens=20), tmp_path / "odd", "native")
    with pytest.raises(CartridgeFormatError, match="20 tokens are not a multiple of 16.*dies"):
        convert(odd, tmp_path / "b", "tokasaurus")
    assert read_cartridge(convert(odd, tmp_path / "p", "peft")).snapshot.num_tokens == 20
    with pytest.raises(CartridgeFormatError, match="end it in .pt"):
        convert(odd, tmp_path / "b", "hazyresearch")
    with pytest.raises(CartridgeFormatError, match="no format 'gguf'; fix: choose one of native, "):
        convert(odd, tmp_path / "b", "gguf")  # type: ignore[arg-type]


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_replaced_unasked_and_folders_of_others_never(
    tmp_path: Path, format: Format
) -> None:
    source = write_cartridge(stored(seed=1), tmp_path / "source", "native")
    target = place(tmp_path, "target", format)
    write_cartridge(stored(), target, format)
    with pytest.raises(FileExistsError):
        convert(source, target, format)
    assert same_bits(read_cartridge(target), stored())
    convert(source, target, format, overwrite=True)
    assert same_bits(read_cartridge(target), stored(seed=1))
    precious = tmp_path / "thesis.pt"
    precious.mkdir()
    (precious / "chapter.tex").write_text("...")
    with pytest.raises((CartridgeFormatError, OSError), match="no cartridge|is a directory"):
        convert(source, precious, format, overwrite=True)
    assert os.listdir(precious) == ["chapter.tex"]


def test_what_lies_beside_a_cartridge_is_not_replaced_with_it(tmp_path: Path) -> None:
    """A note in the folder, a weight file of the same ending, a link to something else."""
    source = write_cartridge(stored(), tmp_path / "source", "native")
    noted = write_cartridge(stored(seed=1), tmp_path / "noted", "native")
    (noted / "notes.txt").write_text("do not lose this")
    with pytest.raises(CartridgeFormatError, match="more than a cartridge: notes.txt"):
        convert(source, noted, "native", overwrite=True)
    assert (noted / "notes.txt").exists() and same_bits(read_cartridge(noted), stored(seed=1))
    weights = tmp_path / "model.pt"
    torch.save({"layer.weight": torch.ones(2)}, weights)
    with pytest.raises(CartridgeFormatError, match="model.pt is not replaced: .*no cartridge"):
        convert(source, weights, "hazyresearch", overwrite=True)
    assert torch.load(weights)["layer.weight"].sum() == 2
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(CartridgeFormatError, match="link is a link"):
        convert(noted, tmp_path / "link", "native", overwrite=True)


@pytest.mark.parametrize("format", FORMATS)
def test_a_write_that_fails_leaves_the_old_one(
    tmp_path: Path, format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = place(tmp_path, "target", format)
    write_cartridge(stored(), target, format)

    def full(path: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "_flush", full)
    with pytest.raises(OSError, match="no space"):
        write_cartridge(stored(seed=1), target, format, overwrite=True)
    assert same_bits(read_cartridge(target), stored())
    assert os.listdir(tmp_path) == [target.name]


def test_json_of_an_older_or_newer_release(tmp_path: Path) -> None:
    path = write_cartridge(stored(), tmp_path / "a", "native")
    about = checkpoint.read_meta(path)
    # As the first release wrote it.
    first = {*about} - {"metrics", "document_title", "base_revision", *HASHES}
    about = {name: about[name] for name in first}
    (path / native.META_FILE).write_text(json.dumps(about))
    meta = read_cartridge(path).meta
    assert (meta.step, meta.metrics, meta.document_title) == (7, {}, None)
    (path / native.META_FILE).write_text(json.dumps(about | {"something_new": 1}))
    with pytest.raises(CartridgeFormatError, match="not known here: something_new"):
        read_cartridge(path)
