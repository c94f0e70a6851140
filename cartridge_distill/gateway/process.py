"""The server process: started on the loopback, watched, drained, started again.

A process that dies is started again, for ever, with a growing pause; requests wait for it. One
that never came up three times in a row will not come up the fourth time: the gateway then ends,
with the reason.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp

from cartridge_distill.gateway.metrics import Metrics
from cartridge_distill.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_REPORT_SECONDS = 5.0
_FAILED_STARTS = 3
_LONGEST_PAUSE = 30.0
_KILL_AFTER_SECONDS = 15.0
# The server closes idle connections after 5 s (uvicorn's default): be first.
_KEEPALIVE_SECONDS = 4.0
_PR_SET_PDEATHSIG = 1


class ServerDown(Exception):
    """The server process does not answer now; it is being started. Becomes HTTP 503."""


def refuse_redirect(response: aiohttp.ClientResponse) -> None:
    """The server process is asked, and nobody that it names.

    Raises:
        ServerDown: it answered with a redirect.
    """
    if 300 <= response.status < 400:
        response.close()
        raise ServerDown(
            f"the server process answered with a redirect (HTTP {response.status}), which is not "
            "followed: what listens on its port is no inference server"
        )


async def _nothing() -> None:
    pass


class ServerProcess:
    """One server process at a time, under one loopback URL.

    Args:
        command: from the port to the argument list.
        environment: of the process.
        settings: timeouts.
        metrics: restarts and state are counted.
        fatal: called with the reason when the process cannot be started.
        before_restart: done before the process is started again.

    Attributes:
        session: HTTP connections to the server, kept alive; for what may be asked twice. Where it
            may not, :meth:`post` is right.
        life: how often it was started; what it had loaded is gone with its life.
    """

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        environment: Mapping[str, str],
        settings: GatewaySettings,
        metrics: Metrics,
        fatal: Callable[[str], None],
        before_restart: Callable[[], Awaitable[None]] = _nothing,
    ) -> None:
        self._port = settings.server_port or _free_port()
        self._command = command(self._port)
        self._environment = dict(environment)
        self._settings = settings
        self._metrics = metrics
        self._fatal = fatal
        self._before_restart = before_restart
        self.url = f"http://127.0.0.1:{self._port}"
        self.life = 0
        self._up = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._inflight = 0
        self._sign_of_life = time.monotonic()
        self._stopping = False
        self._why: str | None = None  # of the restart that is under way, when we wanted it
        self._process: subprocess.Popen[bytes] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.session: aiohttp.ClientSession
        self._once: aiohttp.ClientSession

    # --- from start to stop -------------------------------------------------------------------

    async def start(self) -> None:
        """Begins to start the process; :meth:`wait_up` waits for it."""
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=None, connect=10),
            auto_decompress=False,  # bytes are passed through as they are
            trace_configs=[_tell_reuse()],
        )
        self._once = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, connect=10),
            auto_decompress=False,
        )
        self._tasks = [
            asyncio.create_task(self._supervise(), name="supervise"),
            asyncio.create_task(self._watch_for_stalls(), name="stalls"),
        ]

    async def stop(self) -> None:
        """Ends the process and all it started."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._end_process()
        self._mark(up=False)
        await self.session.close()
        await self._once.close()

    @property
    def pid(self) -> int | None:
        """Of the process that is there now."""
        return self._process.pid if self._process else None

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    async def wait_up(self, timeout_s: float) -> None:
        """Returns at once while the server answers.

        Raises:
            ServerDown: it does not within ``timeout_s``.
        """
        if self._up.is_set():
            return
        try:
            await asyncio.wait_for(self._up.wait(), timeout_s)
        except TimeoutError:
            raise ServerDown(
                f"the server process is not up after {timeout_s:.0f} s of waiting; try again"
            ) from None

    async def restart(self, why: str) -> None:
        """Lets what is in flight finish, within ``drain_s``, then starts the process anew.

        Args:
            why: one word, for the log and the metrics.
        """
        logger.info("restarting the server process: %s", why)
        self._why = why
        self._mark(up=False)  # from here on requests wait
        try:
            await asyncio.wait_for(self._idle.wait(), self._settings.drain_s)
        except TimeoutError:
            logger.warning(
                "%d requests were not done after %.0f s; they get 503",
                self._inflight,
                self._settings.drain_s,
            )
        await self._end_process()
        await self.wait_up(self._settings.startup_timeout_s)

    # --- requests -----------------------------------------------------------------------------

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Around a request to the server."""
        if self._inflight == 0:
            self._sign_of_life = time.monotonic()
        self._inflight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._inflight -= 1
            if self._inflight == 0:
                self._idle.set()

    @asynccontextmanager
    async def post(self, path: str, body: bytes) -> AsyncIterator[aiohttp.ClientResponse]:
        """Sends JSON to the server.

        A kept connection may have been closed by the server, over an earlier request or for its
        age, in the moment in which it is used again. That is no fault of this request, and no sign
        that the process is dead: it is sent again, on a connection of its own.

        Raises:
            aiohttp.ClientError: the server broke off, or does not take connections.
        """
        headers = {"Content-Type": "application/json"}
        reused: list[bool] = []
        try:
            response = await self.session.post(
                self.url + path,
                data=body,
                headers=headers,
                allow_redirects=False,
                trace_request_ctx=reused,
            )
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if not reused:
                raise
            logger.info("a kept connection to the server was closed; asking once more on a new one")
            response = await self._once.post(
                self.url + path, data=body, headers=headers, allow_redirects=False
            )
        async with response:
            yield response

    def heard(self) -> None:
        """Something came from the server."""
        self._sign_of_life = time.monotonic()

    # --- the process --------------------------------------------------------------------------

    async def _supervise(self) -> None:
        failures = 0
        while not self._stopping:
            started = time.monotonic()
            if self.life:
                await self._before_restart()
            self._process = _spawn(self._command, self._environment)
            self.life += 1
            ended = asyncio.create_task(_ended(self._process))
            try:
                answered = await self._wait_until_it_answers(ended)
                if answered:
                    failures = 0
                    logger.info(
                        "the server process answers after %.1f s", time.monotonic() - started
                    )
                    self._mark(up=True)
                    await ended
                    self._mark(up=False)
            finally:
                ended.cancel()
            await self._end_process()  # also what it left behind
            code = self._process.returncode
            why, self._why = self._why, None
            if why is not None:
                self._metrics.restarts.labels(why).inc()
                continue
            if answered:
                self._metrics.restarts.labels("died").inc()
                logger.error("the server process died (exit code %s); starting it again", code)
                continue
            failures += 1
            if failures == _FAILED_STARTS:
                self._fatal(
                    f"the server process did not come up {failures} times (exit code {code}); its "
                    f"own messages are above. Its command: {' '.join(self._command)}"
                )
                return
            pause = min(2.0**failures, _LONGEST_PAUSE)
            logger.error(
                "the server process ended before it answered (exit code %s); next try in %.0f s",
                code,
                pause,
            )
            await asyncio.sleep(pause)

    async def _wait_until_it_answers(self, ended: asyncio.Task[None]) -> bool:
        """False when the process ended, or took too long and was ended."""
        start = time.monotonic()
        next_word = start + _REPORT_SECONDS
        while not ended.done():
            try:
                async with self.session.get(
                    self.url + "/ping",
                    timeout=aiohttp.ClientTimeout(total=5),
                    allow_redirects=False,
                ) as response:
                    if response.status == 200:
                        return True
            except (aiohttp.ClientError, TimeoutError):
                pass  # not yet
            now = time.monotonic()
            if now - start > self._settings.startup_timeout_s:
                logger.error("the server process does not answer after %.0f s", now - start)
                return False
            if now >= next_word:
                logger.info("waiting for the server process: %.0f s", now - start)
                next_word = now + _REPORT_SECONDS
            await asyncio.wait({ended}, timeout=_POLL_SECONDS)
        return False

    async def _watch_for_stalls(self) -> None:
        """The real server's HTTP process goes on when its model process is dead."""
        while True:
            await asyncio.sleep(min(1.0, self._settings.stall_s / 4))
            silent = time.monotonic() - self._sign_of_life
            if self._up.is_set() and self._inflight and silent > self._settings.stall_s:
                logger.error(
                    "the server process has sent nothing for %.0f s with %d requests in flight; "
                    "starting it again",
                    silent,
                    self._inflight,
                )
                self._why = "stalled"
                self._mark(up=False)
                await self._end_process(grace_s=0.0)

    async def _end_process(self, grace_s: float = _KILL_AFTER_SECONDS) -> None:
        """SIGTERM, then SIGKILL, to the process and its descendants."""
        process = self._process
        if process is None:
            return
        if process.poll() is None and grace_s > 0:
            _signal_group(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + grace_s
            while process.poll() is None and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
        _signal_group(process.pid, signal.SIGKILL)
        await asyncio.to_thread(process.wait)

    def _mark(self, up: bool) -> None:
        self._metrics.server_up.set(int(up))
        if up:
            self._up.set()
        else:
            self._up.clear()


def _tell_reuse() -> aiohttp.TraceConfig:
    """Notes in the list that a request brings along that its connection was used before."""

    async def note(_: aiohttp.ClientSession, context: Any, __: object) -> None:
        if context.trace_request_ctx is not None:
            context.trace_request_ctx.append(True)

    config = aiohttp.TraceConfig()
    config.on_connection_reuseconn.append(note)
    return config


async def _ended(process: subprocess.Popen[bytes]) -> None:
    """By looking: asyncio's own child watchers want to be the main thread's."""
    while process.poll() is None:
        await asyncio.sleep(0.05)


def _spawn(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None)

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        # A group of its own: the terminal's Ctrl-C must not end it before what is in flight is
        # done. And it must not outlive a gateway that was killed.
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass  # nobody is left in it


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
