"""``PUT /cartridges/{id}``: received, put where the server reads it, made to work.

The answer is given when the server has generated a token with the new cartridge.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import aiohttp
from starlette.requests import ClientDisconnect

from cartridge_distill.gateway.metrics import Metrics
from cartridge_distill.gateway.model_shape import ModelShape
from cartridge_distill.gateway.pages import PageBudget
from cartridge_distill.gateway.process import ServerDown, ServerProcess, refuse_redirect
from cartridge_distill.gateway.receiving import receive
from cartridge_distill.gateway.settings import GatewaySettings
from cartridge_distill.gateway.store import VersionStore
from cartridge_distill.gateway.version_info import VersionInfo
from cartridge_distill.rollout.protocol import CartridgeCompletionRequest, CartridgeRef
from cartridge_distill.sync.upload import Description, UploadHeader
from cartridge_distill.util.disk import DiskFailed
from cartridge_distill.util.errors import CartridgeFormatError

logger = logging.getLogger(__name__)

_ACTIVATIONS = 3
_COMPLETIONS = "/custom/cartridge/completions"
_LOOK = aiohttp.ClientTimeout(total=10)


class Busy(Exception):
    """More at once than allowed. Becomes HTTP 429."""


@dataclass(frozen=True)
class Uploaded:
    """What became of an upload: ``is_new`` is false when it was there already."""

    info: VersionInfo
    is_new: bool


class Uploads:
    """Takes new versions in."""

    def __init__(
        self,
        settings: GatewaySettings,
        shape: ModelShape,
        store: VersionStore,
        process: ServerProcess,
        pages: PageBudget,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._shape = shape
        self._store = store
        self._process = process
        self._pages = pages
        self._metrics = metrics
        self._running = 0
        self._commit = asyncio.Lock()

    async def take(self, version_id: str, body: AsyncIterator[bytes]) -> Uploaded:
        """One upload, from its first byte until a request with its id works.

        Raises:
            Busy: too many uploads at once.
            CartridgeFormatError: not what it must be; nothing is kept.
            Conflict: the id stands for another content.
            NoRoom: the disk bound.
            DiskFull, DiskFailed: the disk itself.
            ServerDown: the server process did not come up in time, or fails over it; nothing is
                kept, but the id stands for this content from here on.
        """
        if self._running >= self._settings.max_uploads:
            self._metrics.uploads.labels("refused").inc()
            raise Busy(f"{self._running} uploads are under way, which is the limit; try again")
        self._running += 1
        self._metrics.uploads_inflight.inc()
        started = time.monotonic()
        outcome = "refused"
        try:
            folder = self._store.staging_folder()
            try:
                with self._stage("received"):
                    header = await receive(body, folder, partial(self._check, version_id))
                async with self._commit:
                    done = await self._enter(version_id, header, folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)  # gone when it was put into place
            outcome = "created" if done.is_new else "repeated"
        except (ServerDown, ClientDisconnect):
            outcome = "failed"
            raise
        finally:
            self._running -= 1
            self._metrics.uploads_inflight.dec()
            self._metrics.uploads.labels(outcome).inc()
        seconds = time.monotonic() - started
        self._metrics.upload_seconds.observe(seconds)
        self._metrics.upload_bytes.inc(done.info.num_bytes)
        logger.info(
            "version %s %s: %.1f MB, works after %.2f s; %d versions on disk",
            version_id,
            outcome,
            done.info.num_bytes / 1e6,
            seconds,
            len(self._store.infos),
        )
        return done

    def _check(self, version_id: str, header: Description) -> None:
        """Of the description alone: what is refused now need not be received.

        Nothing is deleted for an upload that has only been announced.
        """
        self._shape.check(header, self._settings.max_cartridge_tokens)
        if not self._store.is_known(version_id):
            self._store.check_room(header.data_bytes)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._metrics.upload_stage_seconds.labels(name).observe(time.monotonic() - started)

    async def _enter(self, version_id: str, header: UploadHeader, folder: Path) -> Uploaded:
        """From checked weights to a version that works; one at a time."""
        if not self._store.check_new(version_id, header):
            return Uploaded(self._store.info(version_id), is_new=False)
        self._store.make_room(header.data_bytes)
        with self._stage("placed"):
            info = await asyncio.to_thread(self._store.place, version_id, header, folder)
        self._store.bind(version_id, header)
        try:
            with self._stage("activated"):
                await self._activate(info)
        except (CartridgeFormatError, DiskFailed):
            self._store.discard(version_id)
            if await self._server_has_nothing_of(version_id):
                self._store.unbind(version_id)
            raise
        except BaseException:
            self._store.discard(version_id)
            raise
        self._store.add(info)
        return Uploaded(info, is_new=True)

    async def _server_has_nothing_of(self, version_id: str) -> bool:
        """Whether the server says that it holds no weights under an id that it refused.

        The real server has no such path, so there the id stays bound.
        """
        try:
            async with self._process.session.get(
                self._process.url + "/custom/cartridge/loaded", timeout=_LOOK
            ) as response:
                return response.status == 200 and version_id not in (await response.json())["ids"]
        except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError):
            return False

    async def _activate(self, info: VersionInfo) -> None:
        """One token with the new cartridge: the server has read it.

        Raises:
            CartridgeFormatError: the server refuses it, in its own words.
            DiskFailed: its disk does not give it back.
            ServerDown: it died over it again and again, or does not come up.
        """
        request = CartridgeCompletionRequest(
            model="default",
            prompt=[0],
            max_tokens=1,
            temperature=0.0,
            cartridges=[CartridgeRef(id=info.id, source="local")],
        )
        body = request.model_dump_json(exclude_unset=True).encode()
        why = ""
        for attempt in range(1, _ACTIVATIONS + 1):
            await self._pages.admit({info.id: info.header.num_tokens})
            await self._process.wait_up(self._settings.hold_s)
            try:
                with self._process.serving():
                    async with self._process.post(_COMPLETIONS, body) as response:
                        refuse_redirect(response)
                        answer = await response.text()
            except aiohttp.ClientError as error:
                why = f"it broke off ({type(error).__name__})"
                logger.warning("attempt %d to load %s: %r", attempt, info.id, error)
                # The connection breaks a moment before the process is known to be dead.
                await asyncio.sleep(0.2)
                continue
            if response.status == 200:
                return
            if response.status == 507:
                raise DiskFailed(f"the server could not read it: {_words(answer)}")
            if response.status < 500:
                raise CartridgeFormatError(
                    f"the server refuses the cartridge (HTTP {response.status}): {_words(answer)}"
                )
            why = _words(answer)
            logger.warning("attempt %d to load %s: %s", attempt, info.id, why)
            await asyncio.sleep(0.2)
        raise ServerDown(
            f"the server process failed {_ACTIVATIONS} times to load {info.id!r}; the last time: "
            f"{why}"
        )


def _words(answer: str) -> str:
    """What a server's refusal says."""
    try:
        said = json.loads(answer)["detail"]
    except (ValueError, LookupError, TypeError):
        said = answer
    return str(said)[:600]
