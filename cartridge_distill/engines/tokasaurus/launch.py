"""Starts Tokasaurus' processes, and ends all of them together.

Tokasaurus starts its manager, model workers and download worker with ``multiprocessing`` (*spawn*)
and runs the HTTP server in the main process. Nobody watches the others: when the manager or a model
worker ends, ``/ping`` goes on answering, and every completion waits for ever; when one ends before
the start-up barrier, the main process waits there for ever (a model worker that runs out of memory
in its warm-up does not even end); and SIGTERM ends the main process alone, the others keep the GPU.
Here

* before anything is started, the installed sources are compared with the known ones
  (:mod:`.guard`): every process imports them from the same files, the repairs with them;
* a thread waits for all of them: when one ends, whatever its exit code, the others are killed and
  the main process ends with :data:`CHILD_ENDED` and the reason, for a supervisor to start it again;
* SIGTERM and Ctrl-C are the main process's affair (the HTTP server finishes what is in flight);
  the others ignore them, are killed at its end, and end by themselves should it be killed.

The same without repairs is ``repaired=False``: the processes are watched all the same.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from cartridge_distill.engines.tokasaurus.guard import (
    INSTALL,
    UnknownTokasaurus,
    import_tokasaurus,
    require,
)
from cartridge_distill.util.clean_logs import hide_secrets_in_logs

logger = logging.getLogger(__name__)

CHILD_ENDED = 70
"""Exit code of the main process when another one ended (EX_SOFTWARE)."""


def serve(arguments: Sequence[str], host: str = "127.0.0.1", repaired: bool = True) -> None:
    """Run the server with Tokasaurus' own ``key=value`` arguments until it is told to stop.

    Args:
        host: address that the HTTP server listens on.
        repaired: refuse a Tokasaurus without the repairs.

    Raises:
        TokasaurusMissing, UnknownTokasaurus: before any process was started.
    """
    # Refused here, not after minutes of loading in a child.
    if repaired:
        require()
    else:
        logger.warning("starting Tokasaurus as it is installed, with repairs or without")
    pydra = _import_pydra()
    config_type = import_tokasaurus("common_types").ServerConfig

    def start(config: Any) -> None:
        run_processes(config, host)

    pydra.main(config_type)(start)(list(arguments))


def run_processes(config: Any, host: str) -> None:
    """Start all processes of a finished Tokasaurus configuration; run the local one here.

    Args:
        host: address that the HTTP server listens on, in whichever process it runs.

    Raises:
        UnknownTokasaurus: it starts its processes in another way than the known one.
    """
    entry = import_tokasaurus("entry")
    if not hasattr(entry, "make_proc_dict"):
        raise UnknownTokasaurus(
            "the installed Tokasaurus starts its processes in a way that is not known here "
            f"(no tokasaurus.entry.make_proc_dict). Install the known commit:\n  {INSTALL}"
        )
    # As Tokasaurus does: queues and barriers made from here on are of this kind.
    multiprocessing.set_start_method("spawn", force=True)
    infos, _ = entry.make_proc_dict(config, add_extra_barrier_member=False)
    local = infos.pop(config.local_proc_name)
    logger.info("starting %s; %s runs in this process", ", ".join(infos), config.local_proc_name)
    listen_on(host)
    signal.signal(signal.SIGTERM, _stop)
    with Processes() as processes:
        for name, info in infos.items():
            processes.start(name, info.target, info.args, info.kwargs, host)
        processes.watch()
        local.target(*local.args, **local.kwargs)


class Processes:
    """The other processes of the server; as a context manager, none of them outlives it."""

    def __init__(self) -> None:
        self._processes: dict[str, Any] = {}
        self._ending = threading.Event()

    def start(
        self,
        name: str,
        target: Callable[..., Any],
        arguments: Sequence[Any],
        options: Mapping[str, Any],
        host: str,
    ) -> None:
        """Spawn one process that runs ``target``; see :func:`run_child`."""
        process = multiprocessing.Process(
            name=name, target=run_child, args=(target, arguments, options, host)
        )
        process.start()
        self._processes[name] = process
        logger.info("process %s has pid %d", name, process.pid)

    def watch(self) -> None:
        """From now on, the end of any of them is the end of all, and of this process."""
        threading.Thread(target=self._watch, name="watch-processes", daemon=True).start()

    def _watch(self) -> None:
        sentinels = {process.sentinel: name for name, process in self._processes.items()}
        ended = multiprocessing.connection.wait(list(sentinels))
        if self._ending.is_set():
            return
        for sentinel in ended:
            name = sentinels[sentinel]
            process = self._processes[name]
            process.join()
            logger.error(
                "process %s (pid %d) ended with exit code %s; its own messages are above. Nothing "
                "can be answered without it: ending the server with exit code %d",
                name,
                process.pid,
                process.exitcode,
                CHILD_ENDED,
            )
        self.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: the main thread is in the HTTP server, or waits at a barrier for ever.
        os._exit(CHILD_ENDED)

    def kill(self) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.join()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self.kill()


def run_child(
    target: Callable[..., Any],
    arguments: Sequence[Any],
    options: Mapping[str, Any],
    host: str,
) -> None:
    """What each spawned process runs. An error ends the process at once.

    At once, for a process that has put into a queue what nobody takes (a model worker its warm-up
    batches, when it runs out of memory in the first) would otherwise wait for that at its exit, for
    ever.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave_it_to_the_main_process)
    hide_secrets_in_logs()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    _end_with_parent()
    code = 1
    try:
        listen_on(host)
        target(*arguments, **options)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_with_parent() -> None:
    """A main process that is killed takes nobody along by itself: queues stay open."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(CHILD_ENDED)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()


def _leave_it_to_the_main_process(signum: int, _: FrameType | None) -> None:
    """Not SIG_IGN, which compilers and the like that a model worker starts would inherit."""


def _stop(signum: int, _: FrameType | None) -> None:
    raise SystemExit(0)


def listen_on(host: str) -> None:
    """Have this process listen there: Tokasaurus names 0.0.0.0 in its call of ``uvicorn.run``, and
    asks nobody who they are."""
    import uvicorn

    original = uvicorn.run
    if hasattr(original, "__cartridge_distill__"):
        return

    @functools.wraps(original)
    def run(app: Any, **options: Any) -> None:
        original(app, **(options | {"host": host}))

    run.__cartridge_distill__ = True  # type: ignore[attr-defined]
    uvicorn.run = run


def _import_pydra() -> Any:
    import_tokasaurus("common_types")  # says what is missing, and the fix
    import importlib

    return importlib.import_module("pydra")
