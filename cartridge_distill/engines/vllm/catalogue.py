"""Cartridges by id: found, read without running their code, checked, told apart by content.

A cartridge is known by the SHA-256 of its tensors, whatever the format and wherever it lies. Files
that were looked at once are looked at again only when they have changed.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cartridge_distill.cartridge.compose import join_layers
from cartridge_distill.cartridge.formats.detect import locate, read_local
from cartridge_distill.cartridge.kv_shape import KvShape
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.engines.vllm.options import Options
from cartridge_distill.engines.vllm.wanted import Wanted
from cartridge_distill.rollout.protocol import sanitise_cartridge_id
from cartridge_distill.util.disk import DiskFailed, reading_disk
from cartridge_distill.util.errors import CartridgeDistillError, CartridgeFormatError

_SEEN = 4096
"""Cartridges whose checks are remembered, a few hundred bytes each."""

Stamp = tuple[tuple[str, int, int, int], ...]


class NoCartridge(CartridgeDistillError):
    """A cartridge cannot be served; the message goes to the client with HTTP 400."""


@dataclass(frozen=True)
class Seen:
    """One cartridge that was read and checked: ``tokens`` of it, ``content`` as hexadecimal."""

    tokens: int
    content: str


class Catalogue:
    """Cartridges of one model. Safe to call from several threads.

    Args:
        options: where they lie.
        shape: of the model; None where that is not known, and not checked.
    """

    def __init__(self, options: Options, shape: KvShape | None) -> None:
        self._named = options.cartridges
        self._directory = options.cartridge_dir
        self._shape = shape
        self._lock = threading.Lock()
        self._seen: OrderedDict[tuple[Path, Stamp], Seen] = OrderedDict()

    def wanted(self, ids: Sequence[str]) -> Wanted:
        """What a request for these ids must say; they are read where that was not done yet.

        Raises:
            NoCartridge: one is not there, cannot be read, or is for another model.
            DiskFailed: the disk does not give it.
        """
        ordered = tuple(sorted(set(ids)))
        if len(ordered) != len(ids):
            raise NoCartridge(f"{' and '.join(ids)}: a cartridge stands there twice; name it once")
        seen = [self._look(cartridge_id) for cartridge_id in ordered]
        return Wanted(
            ordered, sum(one.tokens for one in seen), _together([s.content for s in seen])
        )

    def read(self, wanted: Wanted) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Keys and values of a request's cartridges, joined in the order of their ids.

        Returns:
            L tensors ``[1, H, P, D]`` each, on the CPU, in the dtype of the files.

        Raises:
            NoCartridge: they are not there any more, or their content is another one.
        """
        snapshots = [self._read(cartridge_id)[0] for cartridge_id in wanted.ids]
        content = _together([content_of(snapshot) for snapshot in snapshots])
        if content != wanted.content:
            raise NoCartridge(
                f"{' + '.join(wanted.ids)}: the files have changed since the request was taken in; "
                "ask again"
            )
        return join_layers([snapshot.layers() for snapshot in snapshots])

    def _look(self, cartridge_id: str) -> Seen:
        path = self._place(cartridge_id)
        stamp = self._stamp(cartridge_id, path)
        with self._lock:
            seen = self._seen.get((path, stamp))
            if seen is not None:
                self._seen.move_to_end((path, stamp))
                return seen
        snapshot, stamp = self._read(cartridge_id)
        seen = Seen(snapshot.num_tokens, content_of(snapshot))
        with self._lock:
            self._seen[path, stamp] = seen
            while len(self._seen) > _SEEN:
                self._seen.popitem(last=False)
        return seen

    def _read(self, cartridge_id: str) -> tuple[Snapshot, Stamp]:
        path = self._place(cartridge_id)
        before = self._stamp(cartridge_id, path)
        try:
            with reading_disk(path):
                snapshot = read_local(path).snapshot
        except DiskFailed:
            raise
        except (CartridgeFormatError, OSError) as error:
            raise NoCartridge(f"cartridge {cartridge_id!r}: {error}") from error
        after = self._stamp(cartridge_id, path)
        if before != after:
            raise NoCartridge(
                f"cartridge {cartridge_id!r} was replaced while it was read; ask again"
            )
        self._check_shape(cartridge_id, snapshot.kv_shape)
        return snapshot, after

    def _check_shape(self, cartridge_id: str, found: KvShape) -> None:
        if self._shape is None:
            return
        for what, got, want in (
            ("layers", found.num_layers, self._shape.num_layers),
            ("kv heads", found.kv_heads, self._shape.kv_heads),
            ("head size", found.head_dim, self._shape.head_dim),
        ):
            if got != want:
                raise NoCartridge(
                    f"cartridge {cartridge_id!r} has {got} {what}, the served model has {want}: it "
                    "was made for another model"
                )

    def _place(self, cartridge_id: str) -> Path:
        """Where an id lies; in the cartridge directory nothing outside of it is reached.

        Raises:
            NoCartridge: it is not there.
        """
        if self._named is not None:
            if cartridge_id not in self._named:
                raise NoCartridge(
                    f"there is no cartridge {cartridge_id!r:.80}; there are "
                    f"{', '.join(self._named) or 'none'}"
                )
            return Path(self._named[cartridge_id])
        assert self._directory is not None
        try:
            root = self._directory.resolve()
            folder = root / sanitise_cartridge_id(cartridge_id)
            if not folder.is_dir():
                raise NoCartridge(
                    f"cartridge {cartridge_id!r:.80}: there is no folder {folder.name:.80}/ in the "
                    "cartridge directory; publish it there first"
                )
            inside = [folder, *folder.iterdir()]
            outside = [file for file in inside if not file.resolve().is_relative_to(root)]
        except (OSError, ValueError) as error:  # no name, or one too long for the file system
            raise NoCartridge(f"cartridge id {cartridge_id[:80]!r}: {error}") from error
        if outside:
            raise NoCartridge(
                f"cartridge {cartridge_id!r}: {outside[0].name} is a link out of the cartridge "
                "directory, which is not followed"
            )
        return folder

    def _stamp(self, cartridge_id: str, path: Path) -> Stamp:
        """What tells that a file was replaced, without reading it."""
        try:
            _, place = locate(path)
            files = sorted(place.iterdir()) if place.is_dir() else [place]
            stats = [(file, file.stat()) for file in files]
        except (CartridgeFormatError, OSError) as error:
            raise NoCartridge(f"cartridge {cartridge_id!r}: {error}") from error
        return tuple((f.name, s.st_ino, s.st_size, s.st_mtime_ns) for f, s in stats)


def content_of(snapshot: Snapshot) -> str:
    """SHA-256 of a cartridge's tensors with their names, shapes and dtype, as hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in snapshot.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _together(contents: Sequence[str]) -> str:
    if len(contents) == 1:
        return contents[0]
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()
