"""The processes, with a fake Tokasaurus: whoever ends, nobody is left and nobody waits for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cartridge_distill.engines.tokasaurus.launch import CHILD_ENDED
from tests.engines.tokasaurus.fake import write_fake_tokasaurus

PROJECT = Path(__file__).resolve().parents[3]
PROCESSES = ("manager", "model_worker", "server")

pytestmark = pytest.mark.integration


@contextmanager
def running(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    path = os.pathsep.join([str(write_fake_tokasaurus(directory)), str(PROJECT)])
    command = [sys.executable, "-m", "cartridge_distill.engines.tokasaurus", "--unrepaired"]
    process = subprocess.Popen(
        [*command, f"notes={directory}", *arguments],
        env=os.environ | {"PYTHONPATH": path},
        cwd=directory,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.communicate()


def pids(directory: Path, process: subprocess.Popen[str]) -> list[int]:
    """Of all processes of the server, once they have all begun."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        notes = [directory / name for name in PROCESSES]
        if all(note.exists() and note.read_text() for note in notes):
            return [int(note.read_text()) for note in notes]
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError(f"not started: {[note.name for note in notes if not note.exists()]}")


def all_gone(numbers: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(number) for number in numbers):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("how", "code"), [("ends", 3), ("fails", 1), ("fails with a full queue", 1)]
)
def test_the_end_of_one_process_is_the_end_of_all_with_a_reason(
    tmp_path: Path, how: str, code: int
) -> None:
    with running(tmp_path, f"worker={how}") as process:
        said = process.communicate(timeout=60)[1]
        assert process.returncode == CHILD_ENDED
        assert f"ended with exit code {code}" in said and "model_worker" in said
        if how == "fails":
            assert "no such weights" in said
        notes = [tmp_path / name for name in PROCESSES if (tmp_path / name).exists()]
        assert all_gone([int(note.read_text()) for note in notes])


def test_a_process_that_ends_before_the_barrier_leaves_nobody_waiting(tmp_path: Path) -> None:
    with running(tmp_path, "worker=ends", "server=barrier") as process:
        process.communicate(timeout=60)
        assert process.returncode == CHILD_ENDED


def test_one_that_is_killed_from_outside_is_noticed(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        numbers = pids(tmp_path, process)
        os.kill(numbers[0], signal.SIGKILL)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == CHILD_ENDED
        assert f"process manager (pid {numbers[0]}) ended with exit code -9" in said
        assert all_gone(numbers)


@pytest.mark.parametrize("whom", ["main process", "process group"])
@pytest.mark.parametrize("server", ["waits", "full queue"])
def test_sigterm_stops_all_in_order(tmp_path: Path, whom: str, server: str) -> None:
    with running(tmp_path, f"server={server}") as process:
        numbers = pids(tmp_path, process)
        if whom == "main process":
            os.kill(process.pid, signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 0
        assert all_gone(numbers)


def test_a_main_process_that_is_killed_leaves_nobody_behind(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        numbers = pids(tmp_path, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=20)
        assert all_gone(numbers)


def test_a_server_that_returns_ends_the_others(tmp_path: Path) -> None:
    with running(tmp_path, "server=returns") as process:
        process.communicate(timeout=60)
        assert process.returncode == 0
