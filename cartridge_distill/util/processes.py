"""Child processes of a script: started in groups of their own, logged to files, always stopped.

Ray starts daemons that outlive a killed driver. Every child here carries a mark in its environment,
which its descendants inherit, so that at the end all of them can be found and none else is touched.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from cartridge_distill.util.forks import EXECUTABLE, ForkServer, Preloaded
from cartridge_distill.util.shown_text import printable

MARK = "CARTRIDGE_DISTILL_RUN"
_GRACE_SECONDS = 10.0
_LOOK_SECONDS = 0.1


class ChildFailed(RuntimeError):
    """A child ended with an error; the message has the end of its log."""


class Supervisor:
    """Starts children and, on leaving the ``with`` block, ends them and all they started."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self._children: list[subprocess.Popen[bytes]] = []
        self._forks: ForkServer | None = None

    def __enter__(self) -> Supervisor:
        # SIGTERM (a job scheduler, `timeout`) must clean up as Ctrl-C does, and Ctrl-C must do so
        # also where a shell started the script in the background, with SIGINT ignored.
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._previous = {number: signal.signal(number, _as_interrupt) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        # A second Ctrl-C must not stop the cleaning up.
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)
        try:
            self.stop()
            self._stop_forks()
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def preload(self, preloaded: Preloaded, env: dict[str, str] | None = None) -> None:
        """Imports once what the children to come would import each; they are forked from it.

        At most once, before they are started. Returns at once: a child that is started meanwhile
        waits for the imports, as it would for its own.

        Args:
            env: as for :meth:`start`. A child with other values of what libraries read when they
                are imported is started without.
        """
        if self._forks is None:
            self._forks = ForkServer.start(preloaded, self._environment(env))

    @property
    def forks(self) -> bool:
        """Are children forked from what was imported?"""
        return self._forks is not None

    def _environment(self, env: dict[str, str] | None) -> dict[str, str]:
        return {**os.environ, **(env or {}), MARK: self.mark, "PYTHONUNBUFFERED": "1"}

    def start(
        self, command: Sequence[str], log: Path, env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a child that writes to ``log``.

        A Python is forked from what :meth:`preload` imported. The process that is returned then
        stands in for it, and ends as it does.
        """
        environment = self._environment(env)
        environment.pop(EXECUTABLE, None)  # of a supervisor that this process is a child of
        if self._forks is not None and command[0] == sys.executable:
            command = self._forks.command(command[1:])
            environment[EXECUTABLE] = str(self._forks.executable)
        with log.open("wb") as sink:
            child = subprocess.Popen(
                command,
                stdout=sink,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # the terminal's Ctrl-C reaches the supervisor alone
            )
        self._children.append(child)
        return child

    def stop(self) -> None:
        """Asks, waits, then kills; first the children, then whatever still carries the mark.

        What was imported for later children stays.
        """
        for child in reversed(self._children):
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        for child in self._children:
            try:
                child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        left = list(self.marked())
        for process in left:
            with _gone_is_fine():
                process.terminate()
        _, alive = psutil.wait_procs(left, timeout=5)
        for process in alive:
            with _gone_is_fine():
                process.kill()
        psutil.wait_procs(alive, timeout=5)
        self._children.clear()

    def _stop_forks(self) -> None:
        if self._forks is None:
            return
        if self._forks.process.poll() is not None:  # it ends when it is told to, not before
            print(f"the fork server ended early\n{tail(self._forks.log)}", file=sys.stderr)
        self._forks.process.terminate()  # it has nothing to finish
        self._forks.process.wait()
        self._forks.close()
        self._forks = None

    def marked(self) -> Iterator[psutil.Process]:
        """Living processes that a child of this supervisor is, or started."""
        own = {os.getpid(), None if self._forks is None else self._forks.process.pid}
        for process in psutil.process_iter():
            with _gone_is_fine():
                if process.pid not in own and process.environ().get(MARK) == self.mark:
                    yield process


def say(line: str) -> None:
    """Prints at once, also into a pipe."""
    print(printable(line), flush=True)


def _as_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        pass  # it ended between two looks, or was never ours


class Awaited:
    """A child that will be ready some time; nobody need wait for it alone.

    Args:
        ready: is it?
        what: it is called.
        timeout_s: it must be ready after so many seconds.
    """

    def __init__(
        self,
        ready: Callable[[], bool],
        child: subprocess.Popen[bytes],
        log: Path,
        what: str,
        timeout_s: float,
    ) -> None:
        self._ready, self._child, self._log, self._what = ready, child, log, what
        self._timeout_s = timeout_s
        self._start = time.monotonic()
        self._told = 0.0
        self._is_ready = False

    def look(self) -> bool:
        """Is it ready? Tells from time to time how long it has been; does nothing once it is.

        Raises:
            ChildFailed: the child ended, or the time ran out.
        """
        self._is_ready = self._is_ready or self._ready()
        if self._is_ready:
            return True
        waited = time.monotonic() - self._start
        what, log = self._what, self._log
        if self._child.poll() is not None:
            raise ChildFailed(f"{what} ended with status {self._child.returncode}.\n{tail(log)}")
        if waited > self._timeout_s:
            limit = f"{self._timeout_s:.0f} s"
            raise ChildFailed(f"{what} was not ready after {limit}.\n{tail(log)}")
        if waited - self._told >= 30:
            self._told = waited
            print(f"   {what}: {waited:.0f} s ...", flush=True)
        return False

    def wait(self) -> None:
        """Until it is ready.

        Raises:
            ChildFailed: as :meth:`look`.
        """
        while not self.look():
            time.sleep(_LOOK_SECONDS)


def follow(
    child: subprocess.Popen[bytes],
    log: Path,
    show: Callable[[str], str | None],
    quiet: str,
    quiet_s: float = 20.0,
    beside: Callable[[], object] = lambda: None,
) -> int:
    """Prints the lines of a child's log that ``show`` lets through until it ends.

    Args:
        show: a log line to what is printed of it, or None.
        quiet: printed with the seconds gone by when nothing was shown for ``quiet_s``.
        beside: called between two looks; what it raises ends the following.

    Returns:
        The child's exit status.
    """
    start = last = time.monotonic()
    with log.open("r", errors="replace") as source:
        partial = ""
        while True:
            ended = child.poll() is not None
            partial += source.read()
            *lines, partial = partial.split("\n")
            for line in lines:
                if (text := show(line)) is not None:
                    print(text, flush=True)
                    last = time.monotonic()
            if ended:
                return int(child.returncode)
            if time.monotonic() - last > quiet_s:
                last = time.monotonic()
                print(f"   {quiet}: {last - start:.0f} s ...", flush=True)
            beside()
            time.sleep(_LOOK_SECONDS)


def tail(log: Path, lines: int = 25) -> str:
    """The end of a log file, with its path."""
    text = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join([f"--- last lines of {log}", *text[-lines:], "---"])
