"""Versions whose files are not those that were uploaded: refused by name, kept and not served."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.gateway.metrics import Metrics
from cartridge_distill.gateway.store import VersionStore
from cartridge_distill.gateway.version_info import Conflict, Unknown
from cartridge_distill.sync.upload import UploadHeader, encode
from tests.gateway.conftest import StartRig
from tests.gateway.rig import MODEL, MODEL_NAME, until, upload_bytes
from tests.tiny import random_cartridge


def snapshot_of(seed: int) -> Snapshot:
    return Snapshot.take(random_cartridge(MODEL, 16, seed).state_dict(), torch.float32)


def put(store: VersionStore, version: str, seed: int = 0) -> Path:
    """A version as an upload leaves it."""
    snapshot = snapshot_of(seed)
    folder = store.staging_folder()
    torch.save(snapshot.parts, folder / "cartridge.pt")
    store.add(store.place(version, encode(snapshot, MODEL_NAME, 3).header, folder))
    return store.folder(version)


def opened(directory: Path) -> VersionStore:
    """A store as a gateway that starts has it."""
    store = VersionStore(directory, keep=9, max_bytes=10**9, metrics=Metrics())
    store.open()
    asyncio.run(store.check())
    return store


def flip(file: Path, place: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)


def one_bit_of_a_number(folder: Path) -> None:
    flip(folder / "cartridge.pt", (folder / "cartridge.pt").read_bytes().index(b"data/7") + 200)


def other_weights(folder: Path) -> None:
    torch.save(snapshot_of(9).parts, folder / "cartridge.pt")


def layers_exchanged(folder: Path) -> None:
    parts = torch.load(folder / "cartridge.pt", weights_only=True)
    torch.save({name: tensors[::-1] for name, tensors in parts.items()}, folder / "cartridge.pt")


def fewer_frozen_tokens(folder: Path) -> None:
    parts = torch.load(folder / "cartridge.pt", weights_only=True)
    for kind in ("keys", "values"):
        joined = [
            torch.cat(pair, 2)
            for pair in zip(parts[f"frozen_{kind}"], parts[f"trainable_{kind}"], strict=True)
        ]
        parts[f"frozen_{kind}"] = [tensor[:, :, :2].clone() for tensor in joined]
        parts[f"trainable_{kind}"] = [tensor[:, :, 2:].clone() for tensor in joined]
    torch.save(parts, folder / "cartridge.pt")


def cut(folder: Path) -> None:
    os.truncate(folder / "cartridge.pt", (folder / "cartridge.pt").stat().st_size - 100)


def no_weights(folder: Path) -> None:
    (folder / "cartridge.pt").unlink()


def another_model(folder: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["pretrained_model_name_or_path"] = "other"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def another_date(folder: Path) -> None:
    told = json.loads((folder / "version.json").read_text())
    (folder / "version.json").write_text(json.dumps(told | {"created_at": 1.0}))


def no_json(folder: Path) -> None:
    (folder / "version.json").write_text("{")


def of_another_folder(folder: Path) -> None:
    shutil.copy(folder.parent / "sound" / "version.json", folder / "version.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (one_bit_of_a_number, r"data/\d+' is not as it was written: Bad CRC-32"),
        (other_weights, "the tensors on the disk are not those that were uploaded.* SHA-256 "),
        (layers_exchanged, "not those that were uploaded"),
        (fewer_frozen_tokens, "its files have num_frozen_tokens=2, uploaded was 1"),
        (cut, "cannot be read safely"),
        (no_weights, "cartridge.pt is missing"),
        (another_model, "its files have base_model=other, uploaded was tiny"),
        (another_date, "version.json: its entries are not those that were written"),
        (no_json, "version.json: "),
        (of_another_folder, "version.json is of another version, 'sound'"),
    ],
)
def test_what_was_changed_is_refused_by_name_and_stays(
    tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    store = opened(tmp_path)
    put(store, "sound", seed=1)
    folder = put(store, "changed", seed=2)
    change(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    store = opened(tmp_path)
    assert [info.id for info in store.infos] == ["sound"]
    with pytest.raises(Unknown, match=f"'changed' is on the disk and is not served: .*{words}"):
        store.info("changed")
    with pytest.raises(Unknown), store.using(["changed"]):
        pass
    header = encode(snapshot_of(2), MODEL_NAME, 3).header
    with pytest.raises(Conflict, match="on the disk and is not served"):
        store.check_new("changed", header)
    with pytest.raises(Unknown):
        store.delete("changed")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_what_earlier_versions_of_the_gateway_wrote_is_served(tmp_path: Path) -> None:
    folder = put(opened(tmp_path), "old")
    told = json.loads((folder / "version.json").read_text())
    del told["entries_sha256"]
    (folder / "version.json").write_text(json.dumps(told))
    assert [info.id for info in opened(tmp_path).infos] == ["old"]


def test_before_a_restart_only_what_was_written_to_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cartridge_distill.gateway import verifying

    store = opened(tmp_path)
    folders = {version: put(store, version, seed) for seed, version in enumerate(("a", "b", "c"))}
    read: list[str] = []

    def noting(folder: Path, header: UploadHeader) -> None:
        read.append(folder.name)
        check(folder, header)

    check = verifying.check_files
    monkeypatch.setattr(verifying, "check_files", noting)
    asyncio.run(store.check(only_changed=True))
    assert read == []
    os.utime(folders["a"] / "cartridge.pt")  # the same, with another date
    other_weights(folders["b"])
    asyncio.run(store.check(only_changed=True))
    assert read == ["a", "b"]
    assert [info.id for info in store.infos] == ["a", "c"]
    asyncio.run(store.check(only_changed=True))
    assert read == ["a", "b"]


@pytest.mark.integration
def test_a_gateway_serves_what_was_uploaded_or_says_why_not(start_rig: StartRig) -> None:
    rig = start_rig()
    for number in range(3):
        assert rig.put(f"run-step-{number:06d}", upload_bytes(seed=number)).status_code == 201
    changed = rig.cartridges / "run-step-000001"
    # While the server lives it has what it read. Then it dies, and reads anew.
    other_weights(changed)
    rig.server.kill()
    until(lambda: rig.metric("server_restarts_total", "died") == 1, "it is started again")
    until(rig.is_up, "it answers")
    answer = rig.complete("run-step-000001")
    assert answer.status_code == 404 and "not those that were uploaded" in answer.json()["detail"]
    assert rig.complete("run-step-000002").status_code == 200
    assert rig.metric("versions_refused") == 1
    rig.process.kill()
    rig.process.wait()
    flip(rig.cartridges / "run-step-000002" / "cartridge.pt", -3000)
    rig.start()
    listed = [entry["id"] for entry in rig.http.get("/cartridges").json()["cartridges"]]
    assert listed == ["run-step-000000"] and rig.metric("versions_refused") == 2
    for version in ("run-step-000001", "run-step-000002"):
        assert rig.complete(version).status_code == 404
        assert rig.put(version, upload_bytes(seed=7)).status_code == 409
        assert (rig.cartridges / version / "cartridge.pt").is_file()
    assert rig.complete("run-step-000000").status_code == 200
    assert rig.log.count("is not served, and left as it is") == 2


@pytest.mark.parametrize("version", ["", ".", "x" * 300, "\ud800", "a/b"])
def test_a_name_under_which_nothing_can_lie_is_unknown(tmp_path: Path, version: str) -> None:
    with pytest.raises(Unknown):
        opened(tmp_path).info(version)
