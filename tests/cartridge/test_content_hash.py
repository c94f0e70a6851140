"""The hashes of the native format: written with each save, compared at each load."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cartridge_distill.cartridge.checkpoint import (
    convert,
    read_cartridge,
    read_meta,
    record,
    save_cartridge,
    write_cartridge,
)
from cartridge_distill.cartridge.compose import compose
from cartridge_distill.cartridge.content_hash import HASHES, TENSORS, sha256_of
from cartridge_distill.cartridge.formats.stored_cartridge import StoredCartridge
from cartridge_distill.cartridge.hub import pull, push
from cartridge_distill.cli.main import app
from cartridge_distill.sync.upload import encode
from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.sealed import ENTRIES
from tests.cartridge.formats.made import META, same_bits, stored
from tests.tiny import random_cartridge, tiny_model


@pytest.fixture
def native(tmp_path: Path) -> Path:
    return write_cartridge(stored(), tmp_path / "c", "native")


def hash_of(cartridge: StoredCartridge) -> str:
    return sha256_of(tensor for _, tensor in cartridge.snapshot.items())


def test_one_bit_of_a_tensor_is_refused_by_name(native: Path) -> None:
    weights = native / "cartridge.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 4
    weights.write_bytes(data)
    with pytest.raises(
        CartridgeFormatError,
        match=r"cartridge\.safetensors: the tensors are not those that were written: SHA-256 ",
    ):
        read_cartridge(native)


def test_weights_of_another_save_are_refused(native: Path, tmp_path: Path) -> None:
    other = write_cartridge(stored(seed=1), tmp_path / "other", "native")
    shutil.copy(other / "cartridge.safetensors", native)
    with pytest.raises(CartridgeFormatError, match="are not of one save"):
        read_cartridge(native)


def test_one_bit_of_what_is_said_about_it_is_refused_by_name(native: Path) -> None:
    file = native / "cartridge.json"
    text = file.read_text()
    file.write_text(text.replace('"step": 7', '"step": 5'))
    for use in (read_cartridge, read_cartridge, lambda path: record(path, metrics={"a": 1})):
        with pytest.raises(CartridgeFormatError, match=r"cartridge\.json: its entries are not"):
            use(native)
    assert '"step": 5' in file.read_text()  # and nothing was written over it


def test_who_changes_it_by_hand_takes_the_hash_out(
    native: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = read_meta(native)
    del told[ENTRIES]
    (native / "cartridge.json").write_text(json.dumps(told | {"document_title": "mine"}))
    with caplog.at_level(logging.WARNING):
        assert read_cartridge(native).meta.document_title == "mine"
    assert f"has no {ENTRIES}" in caplog.text


def test_files_of_earlier_versions_are_read_with_a_warning(
    native: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = read_meta(native)
    plain = {name: value for name, value in told.items() if name not in HASHES}
    (native / "cartridge.json").write_text(json.dumps(plain))
    with caplog.at_level(logging.WARNING):
        found = read_cartridge(native)
    assert same_bits(found, stored()) and found.sha256 is None
    assert f"has no {TENSORS}, as files of earlier versions" in caplog.text
    assert "none in the file" in CliRunner().invoke(app, ["info", str(native)]).output
    # What adds to it says what it knows: the entries, and not the tensors.
    record(native, metrics={"note": 1})
    assert ENTRIES in read_meta(native) and TENSORS not in read_meta(native)


Way = Callable[[Path, Path], Path]


def _saved(native: Path, target: Path) -> Path:
    return save_cartridge(random_cartridge(tiny_model(), 16), target, META)


def _composed(native: Path, target: Path) -> Path:
    both = [read_cartridge(native), stored(seed=1)]
    return write_cartridge(compose(both), target, "native")


def _recorded(native: Path, target: Path) -> Path:
    record(native, recipe={"lr": 0.5}, metrics={"results": []})
    return native


@pytest.mark.parametrize(
    "way",
    [
        _saved,
        _composed,
        _recorded,
        lambda native, target: convert(native, target, "native"),
        lambda native, target: convert(native, target, "native", dtype=torch.bfloat16),
        lambda native, target: convert(
            convert(native, target.with_name("p"), "peft"), target, "native"
        ),
        lambda native, target: pull(native, target),
        lambda native, target: Path(push(native, target)),
    ],
    ids=["save", "compose", "record", "convert", "dtype", "through peft", "pull", "push"],
)
def test_every_way_of_writing_leaves_the_right_hash(native: Path, tmp_path: Path, way: Way) -> None:
    written = way(native, tmp_path / "target")
    found = read_cartridge(written)
    assert found.sha256 == read_meta(written)[TENSORS] == hash_of(found)


def test_it_is_the_hash_that_a_gateway_shows(native: Path) -> None:
    found = read_cartridge(native)
    assert encode(found.snapshot, "tiny", 0).header.sha256 == found.sha256
    output = CliRunner().invoke(app, ["info", str(native)], terminal_width=200).output
    assert found.sha256 is not None and found.sha256[:40] in output
