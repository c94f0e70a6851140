"""A cartridge directory that cannot be written to: words and a status, and nothing else suffers."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch

from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.rollout.http import ClientSettings
from cartridge_distill.sync.http import HttpPublisher
from cartridge_distill.util.errors import SyncError
from tests.gateway.rig import MODEL, MODEL_NAME, TOKEN, Rig, upload_bytes
from tests.tiny import random_cartridge

pytestmark = pytest.mark.integration
Mount = Callable[[str], None]


@pytest.fixture
def remount(tmp_path: Path) -> Iterator[Mount]:
    """A file system of its own for the cartridges, and a way to make it ``ro`` or ``rw``."""
    folder = tmp_path / "rig" / "cartridges"
    folder.mkdir(parents=True)

    def mount(*options: str) -> int:
        command = ["mount", *options, str(folder)]
        return subprocess.run(command, capture_output=True).returncode

    try:
        failed = mount("-t", "tmpfs", "tmpfs")
    except FileNotFoundError:
        failed = 1
    if failed:
        pytest.skip("no file system can be mounted here")
    try:
        yield lambda how: subprocess.run(
            ["mount", "-o", f"remount,{how}", str(folder)], check=True, capture_output=True
        )
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def words_of(answer: httpx.Response) -> str:
    assert answer.status_code == 507, answer.text
    return str(answer.json()["detail"])


def test_a_directory_that_becomes_read_only(
    remount: Mount, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Rig(tmp_path / "rig", model_folder) as rig:
        assert rig.put("run-step-000000", upload_bytes()).status_code == 201
        remount("ro")
        told = "cannot be written to (Read-only file system)"
        assert told in words_of(rig.put("run-step-000001", upload_bytes(seed=1)))
        assert told in words_of(rig.http.delete("/cartridges/run-step-000000"))
        # What a run says of it: it ends at once, with the words and the version.
        monkeypatch.setenv("TOKASAURUS_API_KEY", TOKEN)
        snapshot = Snapshot.take(random_cartridge(MODEL, 16).state_dict(), torch.bfloat16)
        publisher = HttpPublisher([rig.url], MODEL_NAME, ClientSettings(max_attempts=3))
        with pytest.raises(SyncError, match=r"run-step-000002 .*HTTP 507: .*Read-only file sys"):
            publisher.publish("run-step-000002", snapshot)
        # What is there is served, by this gateway and by the next one.
        assert rig.complete("run-step-000000").status_code == 200
        assert rig.metric("uploads_in_flight") == 0
        rig.process.terminate()
        rig.process.wait()
        rig.start()
        assert rig.complete("run-step-000000").status_code == 200
        remount("rw")
        assert rig.put("run-step-000001", upload_bytes(seed=1)).status_code == 201
        assert "Traceback" not in rig.log


def test_a_staging_folder_that_is_gone(tmp_path: Path, model_folder: Path) -> None:
    with Rig(tmp_path, model_folder) as rig:
        (rig.cartridges / ".staging").rmdir()
        told = words_of(rig.put("run-step-000000", upload_bytes()))
        assert "cannot be written to (No such file or directory)" in told
        assert "Traceback" not in rig.log
