"""Starts a :mod:`~cartridge_distill.util.fork_server`, and says what starts a process by it.

Used by :class:`~cartridge_distill.util.processes.Supervisor`, which ends it, too. On Linux alone;
elsewhere, and where anything about it fails, processes start as they always did.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cartridge_distill.util import fork_client

EXECUTABLE = "CARTRIDGE_DISTILL_FORKED_PYTHON"
"""The environment variable that names :attr:`ForkServer.executable`, for children of the run."""
_MOST_SOCKET_BYTES = 100  # of its path (Linux: 107)


@dataclass(frozen=True)
class Preloaded:
    """What a fork server imports.

    Attributes:
        modules: in this order; one that is not there is left out. Behind a "+", requests are
            served between two of them.
        never: modules that each process must import itself. The first is a package: its scripts
            are those that :attr:`ForkServer.executable` forks.
    """

    modules: tuple[str, ...]
    never: tuple[str, ...]


class ForkServer:
    """A fork server that was started.

    Attributes:
        process: the server.
        log: what it says.
        executable: a file to be named where something asks for a Python: it forks the scripts of
            ``never[0]`` and is a plain Python for all others.
    """

    def __init__(self, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self._folder, self.process = folder, process
        self.executable = folder / "python"
        self.log = folder / "log"

    @classmethod
    def start(cls, preloaded: Preloaded, environment: Mapping[str, str]) -> ForkServer | None:
        """Starts it; it serves when it has imported all.

        Args:
            environment: of the server, whole. Requests with other values of what libraries read
                early become plain Pythons.

        Returns:
            None where there can be none.
        """
        if not sys.platform.startswith("linux") or not hasattr(os, "pidfd_open"):
            return None
        folder = Path(tempfile.mkdtemp(prefix="cartridge-distill-"))
        place = folder / "forks"
        if len(os.fsencode(place)) > _MOST_SOCKET_BYTES:
            folder.rmdir()
            return None
        with socket.socket(socket.AF_UNIX) as listening, (folder / "log").open("wb") as log:
            listening.bind(str(place))
            listening.listen(64)
            never = [word for name in preloaded.never for word in ("--never", name)]
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "cartridge_distill.util.fork_server"),
                    *("--listening", str(listening.fileno()), *never, *preloaded.modules),
                ],
                pass_fds=[listening.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, EXECUTABLE: str(folder / "python")},
                start_new_session=True,
            )
        found = cls(folder, process)
        found._write_executable(preloaded.never[0])
        return found

    def command(self, asked: Sequence[str]) -> list[str]:
        """What starts ``python *asked`` by a fork."""
        return [*self._client(), str(self._folder / "forks"), *asked]

    def close(self) -> None:
        """Takes its files away; the process is the supervisor's to end."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _client(self) -> list[str]:
        return [sys.executable, "-I", "-S", str(Path(fork_client.__file__).resolve())]

    def _write_executable(self, package: str) -> None:
        spec = importlib.util.find_spec(package)
        found = [] if spec is None else list(spec.submodule_search_locations or [])
        only = ["--only", found[0], str(self.executable)] if found else []
        client = [*self._client(), *only, str(self._folder / "forks")]
        line = shlex.join(client if found else [sys.executable])
        self.executable.write_text(f'#!/bin/sh\nexec {line} "$@"\n')
        self.executable.chmod(0o700)
