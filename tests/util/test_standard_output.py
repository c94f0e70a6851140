"""Commands whose standard output is full, closed, or read no further: one line, never a stack."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FULL = Path("/dev/full")
COMMANDS = [
    *(("cartridge_distill.cli.main", *rest) for rest in ([], ["info"], ["prepare"], ["chat"])),
    ("cartridge_distill.gateway",),
    ("verl_patches",),
]
GUARDED = "from cartridge_distill.util.standard_output import guard_output; guard_output(); "

needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


def run(arguments: list[str], stdout: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        stdout=stdout,  # type: ignore[call-overload]
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def one_line(found: subprocess.CompletedProcess[str], why: str) -> None:
    assert found.returncode == 1
    assert found.stderr.startswith(f"error: standard output cannot be written to ({why}); fix: ")
    assert found.stderr.count("\n") == 1


@needs_full
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_for_a_full_disk_is_an_error(command: tuple[str, ...]) -> None:
    with FULL.open("w") as full:
        one_line(run(["-m", *command, "--help"], full), "No space left on device")


@needs_full
@pytest.mark.parametrize(
    "rest",
    [
        "print('x')",  # which is written when the program ends
        "print('x', flush=True)",
        "print('x' * 10**6); print('y')",
        "import threading; t = threading.Thread(target=print, args=('x',), kwargs={'flush': True});"
        " t.start(); t.join(); print('y', flush=True)",
    ],
)
def test_whatever_prints_and_whenever(rest: str) -> None:
    with FULL.open("w") as full:
        found = run(["-c", GUARDED + rest], full)
    if "Thread" in rest:  # the thread's failure ends the thread, and has told why
        assert found.stderr.startswith("error: standard output cannot be written to")
        assert "Traceback" not in found.stderr
    else:
        one_line(found, "No space left on device")


def test_a_closed_output_is_an_error_at_once() -> None:
    command = f'"{sys.executable}" -m cartridge_distill.cli.main --help >&-'
    found = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    one_line(found, "it is closed")


def test_a_reader_that_has_seen_enough_is_told_nothing() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", GUARDED + "\nfor _ in range(10**6): print('line')"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_an_output_that_takes_all_gets_all_and_names_that_are_no_text_too() -> None:
    program = GUARDED + "import os; print('ü', os.fsdecode(b'a\\xff')); guard_output()"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, cwd=ROOT, env={"PYTHONUTF8": "1"}
    )
    assert (found.returncode, found.stderr) == (0, b"")
    assert found.stdout == "ü a\\udcff\n".encode()


def test_unbuffered_output_keeps_its_place_among_errors() -> None:
    code = GUARDED + (
        "import sys; print('a', end=''); print('b', file=sys.stderr); print('c'); "
        "print('d', file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert done.stdout == "ab\nc\nd\n"
