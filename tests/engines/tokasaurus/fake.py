"""A package called ``tokasaurus`` for tests: a folder for ``sys.path``, with what the guard and the
launcher look at, and nothing of the real one."""

from __future__ import annotations

from pathlib import Path

FILES = {
    "pydra/__init__.py": """
def main(config_type):
    def decorate(function):
        def run(arguments):
            config = config_type()
            for argument in arguments:
                name, value = argument.split("=", 1)
                setattr(config, name, value)
            return function(config)
        return run
    return decorate
""",
    "tokasaurus/__init__.py": "",
    "tokasaurus/common_types.py": """
class ServerConfig:
    local_proc_name = "server"
    port = ""
    notes = ""
    worker = "waits"
    server = "waits"


class ProcessInfo:
    args = ()

    def __init__(self, target, config):
        self.target = target
        self.kwargs = {"config": config}
""",
    "tokasaurus/work.py": """
import multiprocessing
import os
import sys
import time
from pathlib import Path


# The sleeps below only keep a process alive until the launcher, or the test, ends it.


def note(config, name):
    Path(config.notes, name).write_text(str(os.getpid()))


def manager(config):
    note(config, "manager")
    time.sleep(600)  # to be there until it is ended


def model_worker(config):
    note(config, "model_worker")
    if config.worker == "ends":
        sys.exit(3)
    if config.worker == "fails":
        raise ValueError("no such weights")
    if config.worker == "fails with a full queue":
        work = multiprocessing.Queue()
        for _ in range(100):
            work.put(b"0" * 2**16)
        raise MemoryError("warm-up")
    time.sleep(600)  # to be there until it is ended


def server(config):
    note(config, "server")
    if config.server == "barrier":
        multiprocessing.Barrier(2).wait()
    if config.server == "returns":
        return
    if config.server == "full queue":
        work = multiprocessing.Queue()
        for _ in range(100):
            work.put(b"0" * 2**16)
    time.sleep(600)  # to be there until it is ended
""",
    "tokasaurus/entry.py": """
from tokasaurus.common_types import ProcessInfo
from tokasaurus import work


def make_proc_dict(config, add_extra_barrier_member=False):
    targets = (work.manager, work.model_worker, work.server)
    return {target.__name__: ProcessInfo(target, config) for target in targets}, None
""",
}


def write_fake_tokasaurus(directory: Path) -> Path:
    """Returns the folder to put on ``sys.path``."""
    for name, text in FILES.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return directory
