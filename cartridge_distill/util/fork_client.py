"""Stands in for a Python that the fork server forks: ``python -I -S fork_client.py SOCKET -m ...``.

What stands behind the socket is what stands behind ``python``. The server gets it with this
process's environment, folder and open files, and forks a process that runs it. This process waits,
passes signals on, ends as that one ends, and takes it along when it is killed. Whoever started it
need not know: it has the process that it asked for, without its imports.

Where the server cannot do it, this process becomes the Python that was asked for. So it does where
the server is gone, or other settings hold here that libraries read when they are imported.

Starts in 20 ms, so it imports little; it is run as a file, by a Python without site-packages.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import sys

FORKED = b"F"
"""The server's first byte when it has forked; anything else is a refusal."""
STATUS = struct.Struct("!i")
"""What it sends in the end: the exit status, or a signal's number below zero."""
LENGTH = struct.Struct("!I")
"""What begins a request: the bytes of its JSON."""
GONE = "ProcessDied: the fork server is gone, and this process with it; fix: start it again"
"""What a stand-in says last; the launcher finds it in the log as the cause."""
MOST_FILES = 200  # that one message may carry (Linux: 253)
_PASSED_ON = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2),
)


def main(arguments: list[str]) -> int:
    """Runs it; returns the exit status.

    Args:
        arguments: maybe ``--only FOLDER EXECUTABLE``, the socket, and what a Python would get.
            With the first, other scripts than those in FOLDER become a plain Python, EXECUTABLE
            is what the forked process takes for its ``sys.executable``, and a library of FOLDER
            that is preloaded is left out: an allocator that is meant for FOLDER's C++ programs.
    """
    folder = executable = None
    if arguments[0] == "--only":
        folder, executable, arguments = arguments[1], arguments[2], arguments[3:]
    place, asked = arguments[0], arguments[1:]
    files = open_files()
    if folder is None or is_below(asked, folder):
        try:
            server = socket.socket(socket.AF_UNIX)
            server.connect(place)
            if ask(server, asked, files, folder, executable):
                return follow(server)
        except OSError:
            pass
    os.execv(sys.executable, [sys.executable, *asked])


def is_below(asked: list[str], folder: str) -> bool:
    """Does it run a script in that folder?"""
    script = next((word for word in asked if word != "-u"), "-")
    return os.path.isabs(script) and os.path.commonpath([script, folder]) == folder


def open_files() -> list[int]:
    """Those that a program in this process's place would have."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.get_inheritable(int(name)):
                found.append(int(name))
        except OSError:
            pass  # the listing itself
    return sorted(found)


def ask(
    server: socket.socket,
    asked: list[str],
    files: list[int],
    folder: str | None,
    executable: str | None,
) -> bool:
    """Has it forked?"""
    if len(files) > MOST_FILES:
        return False
    environment = dict(os.environ)
    if folder is not None and environment.get("LD_PRELOAD", "").startswith(folder):
        del environment["LD_PRELOAD"]
    request = {
        "arguments": asked,
        "environment": environment,
        "folder": os.getcwd(),
        "files": files,
        "ignored": [int(number) for number in _PASSED_ON if ignored(number)],
        "executable": executable,
    }
    words = json.dumps(request).encode("utf-8", "surrogatepass")
    socket.send_fds(server, [LENGTH.pack(len(words))], files)
    server.sendall(words)
    return server.recv(1) == FORKED


def ignored(number: int) -> bool:
    """Python has a handler of its own for SIGINT unless it found it ignored."""
    return signal.getsignal(number) is signal.SIG_IGN


def follow(server: socket.socket) -> int:
    """Waits for the end; returns the status, or ends by the same signal."""
    for number in _PASSED_ON:
        if not ignored(number):
            signal.signal(number, lambda got, _: server.send(bytes([got])))
    parent = os.getppid()
    looked = select.poll()
    looked.register(server, select.POLLIN)
    try:
        looked.register(os.pidfd_open(parent), select.POLLIN)
    except OSError:
        return 1  # it is gone already: nobody waits for this process
    told = b""
    while len(told) < STATUS.size:
        if not any(file == server.fileno() for file, _ in looked.poll()):
            return 1  # whoever started this is gone; the server sees this process end
        got = server.recv(STATUS.size - len(told))
        if not got:
            print(GONE, file=sys.stderr)
            return 1
        told += got
    status = int(STATUS.unpack(told)[0])
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # there is nothing to finish, and nothing to wait for
