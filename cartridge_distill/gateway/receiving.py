"""An upload on its way in: written once, where it stays, and checked meanwhile.

The description in the first kilobytes is checked against the served model before anything is kept.
The tensors are hashed, looked through for NaN and written to their places in the server's own file
as they come: while the next piece is on its way, one thread hashes those before it and another one
looks through them and writes them, and the disk works beside them. In memory there are a few pieces
of an upload and never more, whatever its size.
"""

from __future__ import annotations

import asyncio
import bisect
import errno
import hashlib
import os
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import torch

from cartridge_distill.cartridge.formats.tokasaurus import TOKASAURUS_WEIGHTS, lay_out
from cartridge_distill.cartridge.snapshot import all_finite
from cartridge_distill.sync.upload import (
    DIGEST_BYTES,
    MAX_HEADER_BYTES,
    Description,
    Head,
    StreamedHeader,
    UploadHeader,
    read_head,
)
from cartridge_distill.util.disk import named_disk
from cartridge_distill.util.errors import CartridgeDistillError, CartridgeFormatError

PIECE_BYTES = 2 * 2**20
"""Large enough that handing it to a thread costs nothing; a whole number of any dtype's values."""
PIECES = 4
_FLUSH_BYTES = 16 * PIECE_BYTES


async def receive(
    body: AsyncIterator[bytes], folder: Path, check: Callable[[Description], None]
) -> UploadHeader:
    """Streams an upload into ``folder``, as the weights that the server reads.

    Args:
        check: raises an error for a description that will not do.

    Returns:
        The description, with the SHA-256 of the tensors' bytes in the order of their names
        (:meth:`UploadHeader.tensors`): it stands for the content, whatever the order of the upload.

    Raises:
        CartridgeFormatError: malformed, refused by ``check``, cut short, too long, not finite, or
            its tensors have another SHA-256.
        DiskFull: there is no room for it.
        DiskFailed: it cannot be written.
        Whatever else ``check`` raises.
        After each of these, what was still to come has been read, so that the client, which is
        still sending, gets to see the answer.
    """
    try:
        head, beginning = await _read_head(body)
        check(head.header)
        path = folder / TOKASAURUS_WEIGHTS
        with named_disk(folder, whatever=True):
            places = lay_out(head.header.tensors(), getattr(torch, head.header.dtype), path)
            with path.open("r+b", buffering=0) as file:
                weights = _Weights(head, places, file)
                came = await _stream(beginning, body, weights)
                if came != weights.num_bytes:
                    raise CartridgeFormatError(
                        f"the upload ends after {head.num_bytes + came} of "
                        f"{head.num_bytes + weights.num_bytes} bytes"
                    )
                weights.check()
                digest = await asyncio.to_thread(weights.digest_by_name)
        described = head.header.model_dump(exclude={"format", "sha256"})
        return UploadHeader(**described, sha256=digest)
    except CartridgeDistillError:
        async for _ in body:
            pass
        raise


async def _read_head(body: AsyncIterator[bytes]) -> tuple[Head, bytes]:
    """The description, and what came with it of the tensors."""
    beginning = bytearray()
    async for chunk in body:
        beginning += chunk
        head = read_head(beginning)
        if head is not None:
            return head, bytes(beginning[head.num_bytes :])
        if len(beginning) > MAX_HEADER_BYTES + 8:
            raise CartridgeFormatError("the safetensors header is longer than it says")
    raise CartridgeFormatError(
        f"the upload ends after {len(beginning)} bytes, within its safetensors header"
    )


async def _stream(beginning: bytes, body: AsyncIterator[bytes], weights: _Weights) -> int:
    """Hands what follows the description on piece by piece; returns how many bytes came."""
    pieces = _Pieces(weights)

    async def chunks() -> AsyncIterator[bytes]:
        yield beginning
        async for chunk in body:
            yield chunk

    came = 0
    try:
        async for chunk in chunks():
            came += len(chunk)
            if came > weights.num_bytes:
                raise CartridgeFormatError(
                    f"the upload goes on after its {weights.num_bytes} bytes of tensors"
                )
            rest = pieces.fill(memoryview(chunk))
            while rest:
                await pieces.hand_on()
                rest = pieces.fill(rest)
        await pieces.hand_on()
    finally:
        # All end before the file is closed, also when one of them fails.
        await pieces.end()
    return came


class _Pieces:
    """Takes an upload's bytes into a few pieces of memory, and has threads work on full ones.

    Each thread goes from one piece to the next without asking here, so none waits for the others.
    """

    def __init__(self, weights: _Weights) -> None:
        self._weights = weights
        self._filling = bytearray(PIECE_BYTES)
        self._filled = 0
        self._unused = [bytearray(PIECE_BYTES) for _ in range(PIECES - 1)]
        self._given: deque[tuple[bytearray, list[asyncio.Future[None]]]] = deque()
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=n) for n in ("hash", "write")]
        self._not_flushed = 0
        self._flushing: asyncio.Future[None] | None = None

    def fill(self, chunk: memoryview) -> memoryview:
        """Takes what there is room for; returns the rest, for after :meth:`hand_on`."""
        taken = chunk[: PIECE_BYTES - self._filled]
        self._filling[self._filled : self._filled + len(taken)] = taken
        self._filled += len(taken)
        return chunk[len(taken) :]

    async def hand_on(self) -> None:
        """Gives the piece to the threads; waits for another one that may be filled."""
        weights, piece = self._weights, memoryview(self._filling)[: self._filled]
        loop = asyncio.get_running_loop()
        works = (weights.hash, weights.write)
        doing = [
            loop.run_in_executor(thread, work, piece)
            for thread, work in zip(self._threads, works, strict=True)
        ]
        self._given.append((self._filling, doing))
        self._flush_now_and_then()
        self._filling, self._filled = await self._free(), 0

    async def _free(self) -> bytearray:
        if self._unused:
            return self._unused.pop()
        piece, doing = self._given.popleft()
        try:
            for future in doing:
                await future
        except BaseException:
            self._given.appendleft((piece, doing))  # one of them works on it still
            raise
        return piece

    def _flush_now_and_then(self) -> None:
        """What lies on the disk already need not be waited for at the end."""
        self._not_flushed += self._filled
        if self._not_flushed >= _FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
            self._not_flushed = 0
            self._flushing = asyncio.ensure_future(asyncio.to_thread(self._weights.flush))

    async def end(self) -> None:
        """Waits for the threads.

        Raises:
            OSError: a piece could not be written.
        """
        doing = [future for _, futures in self._given for future in futures]
        if self._flushing is not None:
            doing.append(self._flushing)
        outcomes = await asyncio.gather(*doing, return_exceptions=True)
        for thread in self._threads:
            thread.shutdown()
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome


class _Weights:
    """The tensors of one upload, in the order in which they come: hashed by one thread, checked and
    written by another.

    Attributes:
        num_bytes: of all that follows the description.
    """

    def __init__(self, head: Head, places: dict[str, int], file: IO[bytes]) -> None:
        self._file = file
        self._header = head.header
        self._data_bytes = head.header.data_bytes
        follows = DIGEST_BYTES if isinstance(head.header, StreamedHeader) else 0
        self.num_bytes = self._data_bytes + follows
        self._dtype = getattr(torch, head.header.dtype)
        # By their place in the upload: where each begins there and in the file.
        self._tensors = sorted((start, name, places[name]) for name, start in head.starts.items())
        self._starts = [start for start, _, _ in self._tensors]
        self._digest = hashlib.sha256()
        self._hashed = self._came = 0
        self._following = b""  # the tensors
        self._not_finite: str | None = None

    def hash(self, piece: memoryview) -> None:
        """Takes the next bytes; not from two threads at once."""
        tensors = piece[: self._data_bytes - self._hashed]
        self._digest.update(tensors)
        self._hashed += len(tensors)
        self._following += piece[len(tensors) :]

    def write(self, piece: memoryview) -> None:
        """Takes the next bytes; not from two threads at once."""
        start, end = self._came, min(self._came + len(piece), self._data_bytes)
        while self._came < end:
            number = bisect.bisect_right(self._starts, self._came) - 1
            begins, name, place = self._tensors[number]
            part = piece[self._came - start : min(self._after(number), end) - start]
            if self._not_finite is None and len(part) % self._dtype.itemsize == 0:
                if not all_finite(torch.frombuffer(part, dtype=self._dtype)):
                    self._not_finite = name
            self._write(part, place + self._came - begins)
            self._came += len(part)

    def _write(self, part: memoryview, place: int) -> None:
        while part:  # a call writes 2 GiB at most, and less when a signal comes
            written = os.pwrite(self._file.fileno(), part, place)
            part, place = part[written:], place + written

    def flush(self) -> None:
        """Waits until what was written so far is on the disk."""
        os.fdatasync(self._file.fileno())

    def digest_by_name(self) -> str:
        """SHA-256 of the tensors' bytes, in the order of their names; when all have come."""
        ordered = [name for name, _ in self._header.tensors()]
        if [name for _, name, _ in self._tensors] == ordered:
            return self._digest.hexdigest()
        sizes = {
            name: self._after(number) - start
            for number, (start, name, _) in enumerate(self._tensors)
        }
        places = {name: place for _, name, place in self._tensors}
        digest = hashlib.sha256()
        for name in ordered:
            place, end = places[name], places[name] + sizes[name]
            while place < end:
                piece = os.pread(self._file.fileno(), min(PIECE_BYTES, end - place), place)
                if not piece:
                    raise OSError(errno.EIO, f"{name} cannot be read back")
                digest.update(piece)
                place += len(piece)
        return digest.hexdigest()

    def _after(self, number: int) -> int:
        """Where the tensor with this number in the upload ends there."""
        return self._starts[number + 1] if number + 1 < len(self._starts) else self._data_bytes

    def check(self) -> None:
        """When all have come.

        Raises:
            CartridgeFormatError: they are not what the description says, or not finite.
        """
        found = self._digest.hexdigest()
        if isinstance(self._header, StreamedHeader):
            where, said = "what follows them says", self._following.hex()
        else:
            where, said = "the metadata says", self._header.sha256
        if found != said:
            raise CartridgeFormatError(
                f"the tensors have SHA-256 {found}, {where} {said}: they were changed on their "
                "way, or hashed in another order than that of their offsets"
            )
        if self._not_finite is not None:
            raise CartridgeFormatError(f"{self._not_finite} holds values that are not finite")
