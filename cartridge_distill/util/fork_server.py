"""A process that has imported the libraries, and forks.

A training run is a dozen Python processes, and nearly all of the CPU seconds of its start are the
same imports in each of them. Here they are done once. :mod:`cartridge_distill.util.fork_client`
stands in for the Python that somebody wants to start; this server forks it, with the client's
arguments, environment, folder and open files.

What makes that safe: nothing has been computed here, so no library has threads at work. Only what
libraries read when they are imported could differ from a process of its own, and a request that
has other values of :data:`READ_EARLY` is refused; its client then starts a plain Python. Modules
that must not be forked (``--never``: Ray's library reads its process's identity when it is loaded)
are left to each process; were one here, the server would end.

The processes die with the server. It ends by SIGTERM.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

from cartridge_distill.util.fork_client import FORKED, LENGTH, MOST_FILES, STATUS

READ_EARLY = (
    *("PYTHON", "LD_", "MALLOC_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_"),
    *("TORCH", "PYTORCH_", "ATEN_", "ONEDNN_", "DNNL_", "CUDA_", "NVIDIA_", "TRITON_"),
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "ARROW_", "SSL_", "PROTOCOL_BUFFERS_", "TOKENIZERS_"),
)
"""How the names of variables begin that a library reads once, when it is imported."""
SERVED_BETWEEN = "+"
_NOT_READ = ("PYTHONUNBUFFERED", "CUDA_VISIBLE_DEVICES")  # as each process is told; no GPU is used
_REQUEST_SECONDS = 10.0
_HIGH = 600  # file numbers that no request asks for
_DIE_WITH_PARENT = 1  # Linux's PR_SET_PDEATHSIG
_MOST_BYTES = 16 << 20
_PEER = struct.Struct("3i")  # Linux: process, user, group


class Refused(Exception):
    """The request needs a Python of its own; the message says why."""


class Job:
    """What a forked process is to run."""

    def __init__(self, request: dict[str, Any], files: Sequence[int], client: int) -> None:
        self.arguments: list[str] = list(request["arguments"])
        while self.arguments[:1] == ["-u"]:
            del self.arguments[0]
        self.environment: dict[str, str] = request["environment"]
        self.folder: str = request["folder"]
        self.targets: list[int] = request["files"]
        self.ignored: list[int] = request["ignored"]
        self.executable: str | None = request["executable"]
        self.files = files
        self.client = client

    def check(self, environment: dict[str, str]) -> None:
        """Can it be forked?

        Raises:
            Refused: it cannot.
        """
        first = self.arguments[0] if self.arguments else "-"
        if first.startswith("-") and (first != "-m" or len(self.arguments) < 2):
            raise Refused(f"{first} asks for a Python of its own")
        other = differences(environment, self.environment)
        # Libraries set some themselves, here as in whoever asks.
        other = [n for n in other if self.environment.get(n) != os.environ.get(n)]
        if other:
            raise Refused(f"libraries have read other values of {', '.join(other)}")

    def become(self, server: int) -> None:
        """Makes this process, which was just forked, the one that was asked for."""
        os.setsid()  # whoever ends its group must not end the server's
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(1)
        self._take_rank()
        taken = [fcntl.fcntl(file, fcntl.F_DUPFD, _HIGH) for file in self.files]
        for file, target in zip(taken, self.targets, strict=True):
            os.dup2(file, target, inheritable=True)
        os.closerange(_HIGH, _HIGH + MOST_FILES + len(taken))
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            usual = signal.getsignal(number) if number in _PYTHONS_OWN else signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if number in self.ignored else usual)
        if signal.SIGINT not in self.ignored:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.folder)
        streams = {"stdin": open(0, closefd=False), "stdout": _stream(1), "stderr": _stream(2)}
        for name, stream in streams.items():
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        sys.orig_argv = [sys.executable, *self.arguments]
        if self.executable is not None:
            sys.executable = self.executable
        if "numpy" in sys.modules:  # its global numbers are a process's own, as Python's are
            sys.modules["numpy"].random.seed()
        gc.enable()

    def _take_rank(self) -> None:
        """The client's priority, and its turn when memory runs out: Ray sets both."""
        try:
            os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, self.client))
            with open(f"/proc/{self.client}/oom_score_adj") as theirs:
                turn = theirs.read()
            with open("/proc/self/oom_score_adj", "w") as own:
                own.write(turn)
        except OSError:
            pass  # a system that does not let it; the server's own are kept

    def run(self) -> None:
        """Runs it as a Python would."""
        if self.arguments[0] == "-m":
            sys.argv = [self.arguments[1], *self.arguments[2:]]
            self._look_first_in(self.folder)
            sys.modules.pop(self.arguments[1], None)  # it is to be run, not to have been imported
            runpy.run_module(self.arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = self.arguments
            self._look_first_in(os.path.dirname(os.path.abspath(self.arguments[0])))
            runpy.run_path(self.arguments[0], run_name="__main__")

    def _look_first_in(self, folder: str) -> None:
        if not sys.flags.safe_path:  # then the first entry is none of a program's
            sys.path[0] = folder


_PYTHONS_OWN = (signal.SIGPIPE, signal.SIGXFSZ)  # which it ignores


def _stream(number: int) -> io.TextIOWrapper:
    """Standard output or error, as Python opens them."""
    raw = open(number, "wb", buffering=0, closefd=False)  # noqa: SIM115
    straight = bool(os.environ.get("PYTHONUNBUFFERED"))
    buffer: Any = raw if straight else io.BufferedWriter(raw)
    errors = "backslashreplace" if number == 2 else "strict"
    lines = number == 2 or raw.isatty()
    return io.TextIOWrapper(
        buffer, errors=errors, line_buffering=lines, write_through=straight or number == 2
    )


def differences(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """Names of variables that libraries have read here, and that are others there."""
    names = {name for name in (*ours, *theirs) if name.startswith(READ_EARLY)}
    return sorted(
        name for name in names.difference(_NOT_READ) if ours.get(name) != theirs.get(name)
    )


class Server:
    """Forks what clients ask for.

    Args:
        listening: their socket, bound and listening.
    """

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._environment = dict(os.environ)
        self._looked = select.poll()
        self._looked.register(listening, select.POLLIN)
        self._clients: dict[int, tuple[socket.socket, int]] = {}  # by file: whose process it is
        self._ended: dict[int, int] = {}  # by file that tells of a process's end: its client's file

    def serve(self, wait: bool) -> Job | None:
        """Looks after requests and processes.

        Args:
            wait: until there is a job to run, which is for ever in the server itself. Else only
                those that are waiting are served.

        Returns:
            In a forked process, what it is to run; None in the server.
        """
        while True:
            for file, _ in self._looked.poll(None if wait else 0):
                if file == self._listening.fileno():
                    if (job := self._fork()) is not None:
                        return job
                elif file in self._ended:
                    self._tell(file)
                elif file in self._clients:
                    self._pass_on(file)
            if not wait:
                return None

    def _fork(self) -> Job | None:
        client, _ = self._listening.accept()
        files: list[int] = []
        try:
            client.settimeout(_REQUEST_SECONDS)
            job = _received(client, files)
            job.check(self._environment)
            server = os.getpid()
            process = os.fork()
        except (Refused, OSError, ValueError, KeyError, TypeError) as error:
            print(f"not forked: {error}", flush=True)
            _close(files)
            client.close()
            return None
        if process == 0:
            self._forget(client)
            job.become(server)
            return job
        _close(files)
        told = os.pidfd_open(process)
        self._clients[client.fileno()] = client, process
        self._ended[told] = client.fileno()
        self._looked.register(told, select.POLLIN)
        self._looked.register(client, select.POLLIN)
        with contextlib.suppress(OSError):  # a client that is gone need not be told
            client.sendall(FORKED)
        return None

    def _tell(self, told: int) -> None:
        """A process has ended: its client hears how."""
        client, process = self._clients.pop(self._ended.pop(told))
        _, status = os.waitpid(process, 0)
        self._looked.unregister(told)
        with contextlib.suppress(KeyError):  # it was gone already
            self._looked.unregister(client)
        os.close(told)
        with contextlib.suppress(OSError):
            client.sendall(STATUS.pack(os.waitstatus_to_exitcode(status)))
        client.close()

    def _pass_on(self, file: int) -> None:
        """A client got a signal, or is gone, and takes its process along."""
        client, process = self._clients[file]
        try:
            got = client.recv(16)
        except OSError:
            got = b""
        if not got:
            self._looked.unregister(client)  # it would be readable for ever
        for number in got or [signal.SIGKILL]:
            os.kill(process, number)  # it is there: nobody has waited for it yet

    def _forget(self, client: socket.socket) -> None:
        """In a forked process: these are the server's."""
        self._listening.close()
        client.close()
        for file in self._ended:
            os.close(file)
        for other, _ in self._clients.values():
            other.close()


def _received(client: socket.socket, files: list[int]) -> Job:
    """A client's request; its files are added to ``files``."""
    head, got, _, _ = socket.recv_fds(client, LENGTH.size, MOST_FILES)
    files += got
    length = int(LENGTH.unpack(head)[0])
    if length > _MOST_BYTES:
        raise Refused(f"a request of {length} bytes")
    words = b""
    while len(words) < length:
        part = client.recv(length - len(words))
        if not part:
            raise Refused("a client that is gone")
        words += part
    who = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    process, user, _ = _PEER.unpack(who)
    if user != os.getuid():
        raise Refused(f"user {user}")
    job = Job(json.loads(words.decode("utf-8", "surrogatepass")), files, process)
    if len(job.targets) != len(files):
        raise Refused(f"{len(files)} files of {len(job.targets)}")
    if max(job.targets, default=0) >= _HIGH:
        raise Refused(f"file {max(job.targets)}")
    return job


def _close(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)


def import_all(modules: Sequence[str], never: Sequence[str], server: Server) -> Job | None:
    """Imports what is there of ``modules``; between those behind a "+", requests are served.

    Raises:
        SystemExit: one of ``never`` came along.
    """
    serving = False
    for name in modules:
        if name == SERVED_BETWEEN:
            serving = True
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # it fails in the process that needs it, in its own words
            print(f"not imported: {name}: {error!r}", flush=True)
        if came := [name for name in never if name in sys.modules]:
            raise SystemExit(f"{name} imports {came[0]}, which must not be forked")
        if serving and (job := server.serve(wait=False)) is not None:
            return job
    gc.collect()
    gc.freeze()  # a forked process must not copy memory only to count what is there
    return server.serve(wait=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until it is told to end; in a forked process, runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    option = parser.add_argument
    option("--listening", type=int, required=True, metavar="FD", help="a bound socket, inherited")
    option("--never", action="append", default=[], metavar="MODULE", help="must not be imported")
    option("modules", nargs="*", metavar="MODULE", help="to import; + serves from there on")
    options = parser.parse_args(arguments)
    gc.disable()  # imports make nothing but what stays
    server = Server(socket.socket(fileno=options.listening))
    job = import_all(options.modules, options.never, server)
    if job is not None:
        _run_to_its_end(job)


def _run_to_its_end(job: Job) -> NoReturn:
    """Runs it, and ends the process as a Python ends, but for one thing.

    A Python takes all modules apart before it ends. Here they lie in memory that is shared with the
    server, and each page would be copied first: half a second.
    """
    status: int | str | None = 0
    try:
        job.run()
    except SystemExit as asked:
        status = asked.code
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        status = -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    for finish in (threading._shutdown, atexit._run_exitfuncs):  # type: ignore[attr-defined]
        try:
            finish()
        except BaseException:
            sys.excepthook(*sys.exc_info())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(int(status or 0) & 0xFF)


if __name__ == "__main__":
    main()
