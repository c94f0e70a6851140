"""Sync over HTTP: versions are uploaded to the gateways of one or several servers at once.

``PUT /cartridges/{id}`` answers when a request with that id will work, so a version counts as
published when every gateway has answered. An upload that broke off is sent again, whole; a gateway
that has it already says so.

A thread hashes the version while it is sent; its hash goes last. A gateway of an earlier version,
which wants the hash first, says so by not naming that format, and is sent the hash first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.rollout.http import ClientSettings, RetryingHttp
from cartridge_distill.sync.shared_dir import oldest
from cartridge_distill.sync.upload import (
    FORMATS,
    Upload,
    sha256,
    streamed,
    with_digest,
)
from cartridge_distill.sync.versions import run_of, step_of
from cartridge_distill.util.errors import ConfigError, RolloutError, ServerRefused, SyncError
from cartridge_distill.util.server_url import checked_url

logger = logging.getLogger(__name__)

# An upload that takes longer is worth a line, and another one as often.
_REPORT_SECONDS = 5.0


class HttpPublisher:
    """Uploads versions to every server.

    Args:
        urls: of the gateways; a URL named twice counts once.
        base_model: what the gateways serve; an upload for another model is refused there.
        settings: patience, as for rollouts.

    Raises:
        ConfigError: no URL, or one that is none or holds a password.
    """

    def __init__(
        self, urls: Sequence[str], base_model: str, settings: ClientSettings | None = None
    ) -> None:
        self.urls = list(dict.fromkeys(map(checked_url, urls)))
        if not self.urls:
            raise ConfigError(
                "the HTTP transport needs the URL of at least one gateway; fix: give "
                "actor_rollout_ref.rollout.custom.tokasaurus_url"
            )
        self.base_model = base_model
        self.settings = settings or ClientSettings()
        self._published: list[str] = []

    def publish(self, version: str, snapshot: Snapshot) -> None:
        """Returns when every server has the version.

        Raises:
            SyncError: one does not have it; says which and why. The version must not be used.
        """
        step = step_of(version)

        async def send(http: RetryingHttp, digest: Future[bytes]) -> None:
            # A gateway that refuses the token does not read the body, and a client that is still
            # sending one would see a broken connection and not the reason: ask first.
            listed = await http.json("GET", "/cartridges")
            if _takes_streams(listed):
                upload = streamed(snapshot, self.base_model, step, digest)
            else:
                known = await asyncio.wrap_future(digest)
                upload = with_digest(snapshot, self.base_model, step, known)
            progress = _Progress(version, http.url, upload)
            await http.json(
                "PUT",
                f"/cartridges/{version}",
                content=progress.chunks,
                headers={
                    "Content-Length": str(upload.num_bytes),
                    "Content-Type": "application/octet-stream",
                },
            )

        with ThreadPoolExecutor(1, thread_name_prefix="hash") as hashing:
            failures = self._everywhere(partial(send, digest=hashing.submit(sha256, snapshot)))
        if failures:
            raise SyncError(f"version {version} was not published: " + "; ".join(failures))
        self._published.append(version)

    def retire(self, keep: int) -> list[str]:
        """Asks every gateway to delete what is older than the newest ``keep`` versions.

        One that is gone already, or still in use, is the gateway's to delete: it keeps its own
        bound.
        """
        gone = oldest(self._published, keep)

        async def delete(http: RetryingHttp) -> None:
            for version in gone:
                await _delete(http, version)

        for failure in self._everywhere(delete) if gone else []:
            logger.warning("an old version was not deleted: %s", failure)
        self._published = self._published[len(gone) :]
        return gone

    def delete_runs(self, runs: Collection[str]) -> list[str]:
        """Every gateway is asked what it has, and to delete what is of these runs."""
        gone: set[str] = set()

        async def delete(http: RetryingHttp) -> None:
            listed = await http.json("GET", "/cartridges")
            for version in [entry["id"] for entry in listed["cartridges"]]:
                if run_of(version) in runs and await _delete(http, version):
                    gone.add(version)

        for failure in self._everywhere(delete) if runs else []:
            logger.warning("versions of an earlier run were not deleted: %s", failure)
        return sorted(gone)

    def _everywhere(self, call: Callable[[RetryingHttp], Awaitable[None]]) -> list[str]:
        """Runs one call per server, at once; the failures, in words."""

        async def one(url: str) -> str | None:
            http = RetryingHttp(url, self.settings)
            try:
                await call(http)
            except RolloutError as error:
                return str(error)
            finally:
                await http.close()
            return None

        async def all_of() -> list[str | None]:
            return await asyncio.gather(*[one(url) for url in self.urls])

        # A loop of its own: publishing happens in a thread beside the trainer.
        return [failure for failure in asyncio.run(all_of()) if failure]


def _takes_streams(listed: Any) -> bool:
    """Whether a gateway, which says what it has, takes the hash after the tensors."""
    formats = listed.get("formats") if isinstance(listed, dict) else None
    return isinstance(formats, list) and FORMATS[1] in formats


async def _delete(http: RetryingHttp, version: str) -> bool:
    """Whether it went; one that is gone or in use is left to the gateway."""
    try:
        await http.json("DELETE", f"/cartridges/{version}")
    except ServerRefused as error:
        if error.status not in (404, 409):
            raise
        return False
    return True


class _Progress:
    """Hands out an upload piece by piece and says how far it is."""

    def __init__(self, version: str, url: str, upload: Upload) -> None:
        self._version, self._url, self._upload = version, url, upload

    async def chunks(self) -> AsyncIterator[bytes]:
        sent, next_word = 0, time.monotonic() + _REPORT_SECONDS
        for chunk in self._upload.chunks():
            yield chunk  # type: ignore[misc]  # a memoryview; aiohttp takes any buffer
            sent += len(chunk)
            if time.monotonic() >= next_word:
                logger.warning(
                    "uploading %s to %s: %.0f of %.0f MB",
                    self._version,
                    self._url,
                    sent / 1e6,
                    self._upload.num_bytes / 1e6,
                )
                next_word = time.monotonic() + _REPORT_SECONDS
        if self._upload.digest is not None:
            yield await asyncio.wrap_future(self._upload.digest)
