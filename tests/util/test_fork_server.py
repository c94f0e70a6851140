"""Processes that are forked from one that has the libraries are what they would be without."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cartridge_distill.util.forks import EXECUTABLE, Preloaded
from cartridge_distill.util.processes import Supervisor

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Linux alone forks so")

HEAVY = "a_heavy_library"  # it counts for torch
NEVER = "a_library_like_ray"
SAYS = """
import os, sys
print([os.getcwd(), sys.argv, sys.path[0], os.environ.get("WORD"), __name__, sys.stdin.read()])
print(os.environ.get("OMP_NUM_THREADS"), repr(sys.flags.utf8_mode), os.getpgid(0) == os.getpid())
print("imported before:", "a_heavy_library" in sys.modules, file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on every Python's path with the two libraries."""
    (tmp_path / f"{HEAVY}.py").write_text("import numpy")
    (tmp_path / NEVER).mkdir()
    (tmp_path / NEVER / "__init__.py").touch()
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def supervisor(libraries: Path) -> Iterator[Supervisor]:
    """Its children are forked from what has the heavy library."""
    with Supervisor() as found:
        found.preload(Preloaded((HEAVY,), (NEVER,)))
        yield found


class Program:
    """A program in a file, and what it says."""

    def __init__(self, folder: Path, text: str) -> None:
        self.file, self._log = folder / "program.py", folder / "log"
        self.file.write_text(text)

    def start(self, supervisor: Supervisor, *arguments: str, **env: str) -> subprocess.Popen[bytes]:
        return supervisor.start([sys.executable, *(arguments or (str(self.file),))], self._log, env)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_for(self, words: str) -> None:
        until(lambda: words in self.said)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_forked_process_is_the_one_that_was_asked_for(
    supervisor: Supervisor, libraries: Path
) -> None:
    program = Program(libraries, SAYS)
    asked: list[tuple[str, ...]] = [(str(program.file), "a b", "é"), ("-m", "program", "x")]
    for arguments in asked:
        assert program.start(supervisor, *arguments, WORD="näher").wait() == 7
        forked = program.said
        assert "imported before: True" in forked
        with Supervisor() as plain:
            assert program.start(plain, *arguments, WORD="näher").wait() == 7
        assert forked == program.said.replace("imported before: False", "imported before: True")


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("raise ValueError('planted')", 1, "ValueError: planted"),
        ("import sys; sys.exit('in words')", 1, "in words"),
        ("import atexit; atexit.register(print, 'at the end')", 0, "at the end"),
        (
            "import threading, time\n"
            "threading.Thread(target=lambda: (time.sleep(0.2), print('its thread'))).start()",
            0,
            "its thread",
        ),
        ("print('no newline', end='')", 0, "no newline"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
    ],
    ids=["error", "words", "atexit", "thread", "flush", "interrupt", "killed"],
)
def test_it_ends_as_a_python_ends(
    supervisor: Supervisor, libraries: Path, text: str, status: int, said: str
) -> None:
    program = Program(libraries, text)
    assert program.start(supervisor).wait() == status
    assert said in program.said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_signals_reach_it_and_nothing_outlives_its_stand_in(
    supervisor: Supervisor, libraries: Path, number: signal.Signals
) -> None:
    program = Program(libraries, "import os, time; print('up', os.getpid()); time.sleep(60)")
    child = program.start(supervisor)
    program.wait_for("up")
    forked = int(program.said.split()[1])
    assert forked != child.pid
    child.send_signal(number)
    assert child.wait() == -number
    until(lambda: not psutil.pid_exists(forked))


def test_whoever_started_it_and_ends_takes_it_along(
    supervisor: Supervisor, libraries: Path
) -> None:
    """As Ray's agents end with their raylet."""
    program = Program(libraries, "import os, time; print('up', os.getpid()); time.sleep(60)")
    assert supervisor._forks is not None
    command = supervisor._forks.command([str(program.file)])
    parent = f"import subprocess, time; subprocess.Popen({command!r}); time.sleep(60)"
    log = libraries / "parent"
    child = supervisor.start([sys.executable, "-c", parent], log)  # -c: not forked
    until(lambda: "up" in log.read_text())
    forked = int(log.read_text().split()[1])
    child.kill()
    child.wait()
    until(lambda: not psutil.pid_exists(forked))


@pytest.mark.parametrize(
    ("changed", "forked"),
    [
        ({"OMP_NUM_THREADS": "3"}, False),  # OpenMP has read it
        ({"HF_HUB_OFFLINE": "7"}, False),
        ({"WORD": "another"}, True),
    ],
)
def test_what_a_library_reads_when_it_is_imported_is_read_anew(
    supervisor: Supervisor, libraries: Path, changed: dict[str, str], forked: bool
) -> None:
    program = Program(libraries, SAYS)
    assert program.start(supervisor, **changed).wait() == 7
    assert f"imported before: {forked}" in program.said
    assert changed.get("OMP_NUM_THREADS", "") in program.said


def test_when_the_server_dies_its_processes_do_and_later_ones_start_without(
    supervisor: Supervisor, libraries: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = Program(libraries, "import os, time; print('up', os.getpid()); time.sleep(60)")
    child = program.start(supervisor)
    program.wait_for("up")
    forked = int(program.said.split()[1])
    assert supervisor._forks is not None
    supervisor._forks.process.kill()
    assert child.wait() == 1
    assert "ProcessDied: the fork server is gone" in program.said
    until(lambda: not psutil.pid_exists(forked))
    program = Program(libraries, SAYS)
    assert program.start(supervisor).wait() == 7
    assert "imported before: False" in program.said
    supervisor.__exit__()
    assert "the fork server ended early" in capfd.readouterr().err


def test_a_library_that_must_not_be_forked_ends_the_server(libraries: Path) -> None:
    (libraries / f"{HEAVY}.py").write_text(f"import {NEVER}")
    program = Program(libraries, SAYS)
    with Supervisor() as found:
        found.preload(Preloaded((HEAVY,), (NEVER,)))
        assert program.start(found).wait() == 7
        assert "imported before: False" in program.said
        assert found._forks is not None
        assert f"{HEAVY} imports {NEVER}, which must not be forked" in found._forks.log.read_text()


def test_what_cannot_be_imported_is_left_to_the_process_that_needs_it(libraries: Path) -> None:
    program = Program(libraries, SAYS)
    with Supervisor() as found:
        found.preload(Preloaded(("there_is_none", "+", HEAVY), (NEVER,)))
        assert found._forks is not None
        until(lambda: "not imported: there_is_none" in found._forks.log.read_text())
        program.start(found).wait()
        until(lambda: program.start(found).wait() == 7 and "before: True" in program.said)


def test_the_executable_forks_the_scripts_of_one_package_alone(
    supervisor: Supervisor, libraries: Path
) -> None:
    """It stands in for ``sys.executable`` where Ray starts its processes."""
    told = "import os, sys; print(sys.executable, 'a_heavy_library' in sys.modules)"
    told += "; print(os.read(int(sys.argv[1]), 9), os.environ.get('LD_PRELOAD'))"
    script = libraries / NEVER / "worker.py"
    script.write_text(told)
    other = libraries / "other.py"
    other.write_text(told)
    program = Program(libraries, f"import os; print(os.environ['{EXECUTABLE}'])")
    program.start(supervisor).wait()
    executable = program.said.strip()
    # Ray's C++ programs have an allocator of Ray's.
    allocator = str(libraries / NEVER / "allocator.so")
    environment = {**os.environ, "LD_PRELOAD": allocator}
    for file, begins, preloaded in (
        (script, f"{executable} True", None),
        (other, f"{sys.executable} False", allocator),
    ):
        read, write = os.pipe()
        os.write(write, b"from file")
        command = [executable, "-u", str(file), str(read)]
        done = subprocess.run(
            command, pass_fds=[read], env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        os.close(read)
        os.close(write)
        assert done.stdout == f"{begins}\nb'from file' {preloaded}\n"


def test_two_forked_processes_draw_different_numbers(
    supervisor: Supervisor, libraries: Path
) -> None:
    program = Program(
        libraries, "import numpy, random; print(numpy.random.rand(), random.random())"
    )
    drawn = set()
    for _ in range(2):
        program.start(supervisor).wait()
        drawn |= set(program.said.split())
    assert len(drawn) == 4


def test_nothing_is_left_when_the_supervisor_ends(libraries: Path) -> None:
    program = Program(libraries, "import os, time; print('up', os.getpid()); time.sleep(60)")
    with Supervisor() as found:
        found.preload(Preloaded((HEAVY,), (NEVER,)))
        assert found._forks is not None
        server, log = found._forks.process, found._forks.log
        program.start(found)
        program.wait_for("up")
        forked = int(program.said.split()[1])
        assert forked in {process.pid for process in found.marked()}
        found.stop()  # the children; what was imported stays
        assert not psutil.pid_exists(forked) and server.poll() is None
        program.start(found)
        program.wait_for("up")
        forked = int(program.said.split()[1])
    assert not psutil.pid_exists(forked)
    assert server.poll() is not None and not log.parent.exists()


def test_where_the_socket_would_have_too_long_a_name_processes_start_without(
    libraries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = libraries / ("a" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    program = Program(libraries, SAYS)
    with Supervisor() as found:
        found.preload(Preloaded((HEAVY,), (NEVER,)))
        assert not found.forks and list(deep.iterdir()) == []
        assert program.start(found).wait() == 7
        assert "imported before: False" in program.said


def test_a_python_that_looks_in_no_folder_of_its_own_does_not_either(
    libraries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    program = Program(libraries, "import sys, json; print(json.dumps(sys.path))")
    with Supervisor() as found:
        program.start(found).wait()
        plain = program.said
        found.preload(Preloaded((HEAVY,), (NEVER,)))
        program.start(found).wait()
    assert program.said == plain
