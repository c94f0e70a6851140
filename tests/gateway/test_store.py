"""What stays and what goes, of versions on a real disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from cartridge_distill.gateway import store as store_module
from cartridge_distill.gateway.metrics import Metrics
from cartridge_distill.gateway.process import ServerDown
from cartridge_distill.gateway.store import VersionStore
from cartridge_distill.sync.upload import UploadHeader
from cartridge_distill.util.disk import DiskFailed
from tests.gateway.rig import until

HEADER = UploadHeader(
    base_model="tiny",
    step=0,
    num_tokens=16,
    num_frozen_tokens=1,
    num_layers=2,
    kv_heads=2,
    head_dim=16,
    dtype="float32",
    sha256="0" * 64,
)


def put(store: VersionStore, step: int) -> str:
    version = f"run-step-{step:06d}"
    folder = store.staging_folder()
    (folder / "cartridge.pt").write_bytes(b"weights")
    store.add(store.place(version, HEADER, folder))
    return version


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    made = VersionStore(tmp_path / "cartridges", keep=1, max_bytes=10**9, metrics=Metrics())
    made.open()
    return made


def test_what_lies_in_a_versions_place_and_is_not_ours_stays(store: VersionStore) -> None:
    place = store.folder("run-step-000000")
    place.mkdir()
    (place / "users.txt").write_text("mine")
    with pytest.raises(DiskFailed):
        put(store, 0)
    assert (place / "users.txt").read_text() == "mine"


def ids(store: VersionStore) -> list[str]:
    return [info.id for info in store.infos]


def test_a_version_outlives_the_request_that_failed_with_it(
    store: VersionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = put(store, 0)
    with pytest.raises(ServerDown), store.using([first]):
        second = put(store, 1)
        assert ids(store) == [first, second]  # it is in use
        raise ServerDown("the client will ask again")
    third = put(store, 2)
    assert ids(store) == [first, third]  # nobody was told to come back for the second
    monkeypatch.setattr(store_module, "RETRY_SECONDS", 0.0)
    with pytest.raises(ServerDown), store.using([first]):
        raise ServerDown("again, and now its time is over")
    last = put(store, 3)
    assert ids(store) == [last]


def test_a_version_whose_requests_were_answered_goes_with_the_next(store: VersionStore) -> None:
    first = put(store, 0)
    with store.using([first]):
        put(store, 1)
    last = put(store, 2)
    assert ids(store) == [last]
    folders = sorted(path.name for path in store.directory.iterdir())
    assert folders == [".staging", last]
    staging = store.directory / ".staging"
    until(lambda: not any(staging.iterdir()), "what was deleted is gone")


def test_what_a_crash_left_half_written_is_gone_with_the_next_start(store: VersionStore) -> None:
    whole = put(store, 0)
    (store.staging_folder() / "cartridge.pt").write_bytes(b"half")
    again = VersionStore(store.directory, keep=1, max_bytes=10**9, metrics=Metrics())
    again.open()
    assert ids(again) == [whole]
    assert list((store.directory / ".staging").iterdir()) == []
