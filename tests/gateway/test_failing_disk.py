"""A disk that fails under a running gateway: words, HTTP 507, nothing half-written is served.

The faults are the kernel's own: a file system that fills up, a disk that is taken away under a
mounted ext4, and a file that reads as EIO. What no such fault can hit at the right moment is done
by a stand-in, and the test's name says so.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from cartridge_distill.cartridge.checkpoint import write_tokasaurus
from cartridge_distill.gateway.app import create_app
from cartridge_distill.gateway.metrics import Metrics
from cartridge_distill.gateway.settings import GatewaySettings
from cartridge_distill.gateway.store import VersionStore
from cartridge_distill.gateway.verifying import problem_of
from cartridge_distill.rollout.protocol import CartridgeRef
from cartridge_distill.server.cartridges import CartridgeStore
from cartridge_distill.sync.upload import UploadHeader, read_head
from cartridge_distill.util import files
from cartridge_distill.util.disk import DiskFailed
from cartridge_distill.util.errors import CartridgeFormatError, ConfigError
from tests.failing_disks import Disk, mounted, run, unreadable
from tests.gateway.rig import COMPLETIONS, MODEL, MODEL_NAME, Rig, completion, until, upload_bytes
from tests.tiny import random_cartridge

pytestmark = pytest.mark.integration


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path, tmp_path / "rig" / "cartridges")
    yield made
    made.close()


def header() -> UploadHeader:
    head = read_head(upload_bytes())
    assert head is not None
    return head.header


def restart_server(rig: Rig) -> None:
    """The server dies, and is there again: with nothing in its memory."""
    rig.server.kill()
    until(lambda: not rig.is_up(), "the gateway has seen it")
    until(rig.is_up, "the server is there again", 240)


def end(rig: Rig) -> None:
    rig.process.terminate()
    rig.process.wait()


def words_of(answer: httpx.Response) -> str:
    assert answer.status_code == 507, answer.text
    body = answer.json()
    return str(body["error"]["message"] if "error" in body else body["detail"])


def test_a_disk_that_fills_up(tmp_path: Path, model_folder: Path) -> None:
    folder = tmp_path / "rig" / "cartridges"
    folder.mkdir(parents=True)
    size = len(upload_bytes(tokens=1024))
    with mounted("-t", "tmpfs", "-o", f"size={int(1.5 * size)},nr_inodes=50", "tmpfs", folder):
        with Rig(tmp_path / "rig", model_folder) as rig:
            # In the middle of the weights.
            assert rig.put("run-step-000000", upload_bytes(tokens=1024)).status_code == 201
            told = words_of(rig.put("run-step-000001", upload_bytes(tokens=1024, seed=1)))
            assert "No space left on device" in told and str(folder) in told
            assert rig.on_disk() == ["run-step-000000"]
            assert rig.complete("run-step-000001").status_code == 404
            assert rig.complete("run-step-000000").status_code == 200
            # With room again the very id works.
            assert rig.http.delete("/cartridges/run-step-000000").status_code == 200
            assert rig.on_disk() == []
            assert rig.put("run-step-000001", upload_bytes(tokens=1024, seed=1)).status_code == 201
            assert rig.complete("run-step-000001").status_code == 200
            # Behind the weights: a folder and they have room, what stands beside them has none.
            found = os.statvfs(folder)
            used = found.f_files - found.f_ffree
            run("mount", "-o", f"remount,nr_inodes={used + 2}", folder)
            told = words_of(rig.put("run-step-000002", upload_bytes(seed=2)))
            assert "No space left on device" in told
            assert rig.on_disk() == ["run-step-000001"]
            run("mount", "-o", "remount,nr_inodes=50", folder)
            assert rig.put("run-step-000002", upload_bytes(seed=2)).status_code == 201
            assert "Traceback" not in rig.log


def test_a_start_on_a_full_disk_is_refused_in_words(tmp_path: Path, model_folder: Path) -> None:
    folder = tmp_path / "cartridges"
    folder.mkdir()
    settings = GatewaySettings(
        model=str(model_folder), model_name=MODEL_NAME, cartridge_dir=folder, server_args=()
    )
    with mounted("-t", "tmpfs", "-o", "nr_inodes=1", "tmpfs", folder):
        for _ in range(2):  # the first lets go of the folder
            with pytest.raises(ConfigError, match=r"dir: the disk of .*No space left on device"):
                create_app(settings, None)


@pytest.mark.long
def test_a_disk_that_is_taken_away(disk: Disk, tmp_path: Path, model_folder: Path) -> None:
    with Rig(tmp_path / "rig", model_folder, "--keep-versions", 2) as rig:
        for step in (0, 1):
            body = upload_bytes(seed=step, tokens=1024)
            assert rig.put(f"run-step-00000{step}", body).status_code == 201
        right = rig.complete("run-step-000000", temperature=0.0).json()["choices"]
        disk.fail()
        told = words_of(rig.put("run-step-000002", upload_bytes(seed=2, tokens=1024)))
        assert "Input/output error" in told and "cartridges" in told
        assert rig.complete("run-step-000002").status_code == 404
        # What the server has read is served from memory.
        assert rig.complete("run-step-000000", temperature=0.0).json()["choices"] == right
        # A new server would have to read it.
        restart_server(rig)
        told = words_of(rig.complete("run-step-000000"))
        assert "Input/output error" in told and "run-step-000000" in told
        assert rig.complete().status_code == 200  # the bare model needs no disk
        assert "Traceback" not in rig.log
        # A gateway that starts says so of each version, and serves the bare model.
        end(rig)
        rig.start()
        assert "Input/output error" in words_of(rig.complete("run-step-000000"))
        assert "Input/output error" in words_of(rig.put("run-step-000002", upload_bytes()))
        assert rig.complete().status_code == 200 and rig.metric("versions_refused") == 2
        assert "Traceback" not in rig.log
        end(rig)
        disk.come_back()
        rig.start()
        assert rig.complete("run-step-000000", temperature=0.0).json()["choices"] == right
        assert rig.put("run-step-000002", upload_bytes(seed=2, tokens=1024)).status_code == 201
        assert rig.complete("run-step-000002").status_code == 200


@pytest.mark.long
def test_versions_with_a_bad_block(tmp_path: Path, model_folder: Path) -> None:
    with Rig(tmp_path, model_folder) as rig:
        for name in "abcd":
            assert rig.put(name, upload_bytes(seed=ord(name))).status_code == 201
        with ExitStack() as faults:
            faults.enter_context(unreadable(rig.cartridges / "a" / "cartridge.pt"))
            faults.enter_context(unreadable(rig.cartridges / "b" / "config.yaml"))
            restart_server(rig)
            for name in "ab":
                told = words_of(rig.complete(name))
                assert "cannot be read (Input/output error)" in told
                assert str(rig.cartridges / name) in told
                # OpenAI's chat API says it in its own form.
                chat = {"model": name, "messages": [{"role": "user", "content": "Hi"}]}
                told = words_of(rig.http.post("/v1/chat/completions", json=chat))
                assert "Input/output error" in told
                # Neither the old id nor an upload under it makes another thing of it.
                assert "Input/output error" in words_of(rig.http.get(f"/cartridges/{name}"))
                again = rig.put(name, upload_bytes(seed=ord(name)))
                assert "Input/output error" in words_of(again)
            assert rig.complete("c").status_code == 200
            assert rig.put("e", upload_bytes(seed=5)).status_code == 201
            assert "Traceback" not in rig.log
            # The start of a gateway looks at every version.
            end(rig)
            faults.enter_context(unreadable(rig.cartridges / "d" / "version.json"))
            rig.start()
            assert rig.metric("versions_refused") == 3
            for name in "abd":
                told = words_of(rig.complete(name))
                assert "cannot be read (Input/output error)" in told and "gateway anew" in told
            assert rig.complete("c").status_code == 200
            assert rig.put("f", upload_bytes(seed=6)).status_code == 201
            assert "Traceback" not in rig.log
            end(rig)
        rig.start()
        assert [rig.complete(name).status_code for name in "abcdef"] == [200] * 6


def test_an_activation_that_cannot_read_by_a_stand_in_in_the_server(
    failing_gateway: tuple[httpx.Client, Path], tmp_path: Path
) -> None:
    """The upload was written, and the server's own read of it fails."""
    http, flag = failing_gateway
    reads = flag.with_name(flag.name + ".reads")
    reads.touch()
    told = words_of(http.put("/cartridges/v", content=upload_bytes(seed=1)))
    assert "the server could not read it" in told and "Input/output error" in told
    assert not (tmp_path / "cartridges" / "v").exists()
    assert http.post(COMPLETIONS, json=completion("v")).status_code == 404
    reads.unlink()
    # The server has nothing of it, so the id may stand for something else.
    assert http.put("/cartridges/v", content=upload_bytes(seed=2)).status_code == 201
    assert http.post(COMPLETIONS, json=completion("v")).status_code == 200


def test_what_the_disk_does_not_give_is_told_from_what_is_another(
    tmp_path: Path, model_folder: Path
) -> None:
    """What the server and the gateway's look at a version make of a bad block."""
    folder = tmp_path / "v"
    cartridge = random_cartridge(MODEL, 16)
    write_tokasaurus(cartridge, folder, MODEL_NAME)
    for name in ("cartridge.pt", "config.yaml"):
        served = CartridgeStore(tmp_path, MODEL, 10**9)
        with unreadable(folder / name):
            with pytest.raises(DiskFailed, match=rf"v/{name} cannot be read \(Input/output error"):
                served.prefix([CartridgeRef(id="v", source="local")])
            assert isinstance(problem_of(folder, header()), DiskFailed)
        assert served.prefix([CartridgeRef(id="v", source="local")]) is not None
    assert isinstance(problem_of(folder, header()), CartridgeFormatError)  # another dtype


def test_versions_that_the_disk_does_not_give_at_the_start(tmp_path: Path) -> None:
    store = VersionStore(tmp_path, keep=2, max_bytes=10**9, metrics=Metrics())
    store.open()
    store.add(store.place("run-step-000000", header(), store.staging_folder()))
    with unreadable(tmp_path / "run-step-000000" / "version.json"):
        again = VersionStore(tmp_path, keep=2, max_bytes=10**9, metrics=Metrics())
        again.open()
    told = r"version.json cannot be read \(Input/output error\).* start the gateway anew"
    for ask in (again.info, again.check_served, lambda name: again.check_new(name, header())):
        with pytest.raises(DiskFailed, match=told):
            ask("run-step-000000")
    assert again.check_new("run-step-000001", header())


def test_a_flush_that_fails_by_a_stand_in_for_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder has its name already; nobody may find it there, and the id is free again."""
    store = VersionStore(tmp_path, keep=2, max_bytes=10**9, metrics=Metrics())
    store.open()

    def broken(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(files, "_flush", broken)
        with pytest.raises(DiskFailed, match=r"cannot be written to \(Input/output error\)"):
            store.place("run-step-000000", header(), store.staging_folder())
    assert not store.folder("run-step-000000").exists()
    assert store.check_new("run-step-000000", header())


def test_an_old_version_that_cannot_go_by_a_stand_in_for_its_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one works, and its client is told so."""
    store = VersionStore(tmp_path, keep=1, max_bytes=10**9, metrics=Metrics())
    store.open()
    store.add(store.place("run-step-000000", header(), store.staging_folder()))
    second = store.place("run-step-000001", header(), store.staging_folder())
    replace = os.replace

    def broken(source: Path, target: Path) -> None:
        if source == store.folder("run-step-000000"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        store.add(second)
    assert [info.id for info in store.infos] == ["run-step-000000", "run-step-000001"]
    with store.using(["run-step-000001"]):
        pass
