"""Sync: a new cartridge reaches the server before the next rollout.

A Tokasaurus server never loads an id twice, so every version gets a new id,
``<run>-step-000012``, and ``<run>`` itself is new for every start: an id of an earlier run on a
server that still lives would silently give that run's weights. Transports implement
:class:`CartridgePublisher`; here is the one for a directory that trainer and server share.
"""

from __future__ import annotations

import re
import secrets
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import torch

from cartridge_distill.cartridge import TrainableCache
from cartridge_distill.checkpoint import write_tokasaurus
from cartridge_distill.errors import ConfigError, SyncError

_RUN = re.compile(r"[A-Za-z0-9]+(?:[-_][A-Za-z0-9]+)*")
_VERSION = re.compile(rf"(?P<run>{_RUN.pattern})-step-(?P<step>\d{{6}})")


def new_run_id(name: str) -> str:
    """A run id that no earlier run had: ``<name>-<utc time>-<4 hex digits>``.

    Raises:
        ConfigError: the name holds what Tokasaurus would rewrite in an id.
    """
    if not _RUN.fullmatch(name):
        raise ConfigError(
            f"run name {name!r}: use letters and digits with single - or _ between them; "
            "Tokasaurus rewrites anything else, and the id would no longer be found"
        )
    return f"{name}-{datetime.now(UTC):%Y%m%d%H%M%S}-{secrets.token_hex(2)}"


def version_id(run: str, step: int) -> str:
    """The id under which the cartridge after ``step`` optimizer steps is served."""
    return f"{run}-step-{step:06d}"


def step_of(version: str) -> int:
    """The optimizer step of a version id.

    Raises:
        SyncError: not an id of ours.
    """
    match = _VERSION.fullmatch(version)
    if match is None:
        raise SyncError(f"{version!r} is no version id; expected <run>-step-000012")
    return int(match["step"])


class CartridgePublisher(Protocol):
    """Puts versions where the server finds them."""

    def publish(self, version: str, cartridge: TrainableCache) -> None:
        """Makes a version available; on return a request with this id may be sent."""

    def retire(self, keep: int) -> list[str]:
        """Deletes all but the newest ``keep`` versions published here; returns what went."""


class SharedDirectoryPublisher:
    """Writes versions into the directory that the server reads (its ``cartridge_dir``).

    Args:
        directory: shared with the server.
        base_model: recorded in ``config.yaml``.
        dtype: of the tensors on disk; the dtype that the trainer's forward computes in, so that
            both sides hold the same numbers.
    """

    def __init__(self, directory: str | Path, base_model: str, dtype: torch.dtype) -> None:
        self.directory = Path(directory)
        self.base_model = base_model
        self.dtype = dtype
        self._published: list[str] = []
        self.directory.mkdir(parents=True, exist_ok=True)

    def publish(self, version: str, cartridge: TrainableCache) -> None:
        """Atomic: the directory of a version is whole or absent.

        Raises:
            SyncError: the id is malformed, taken, or the directory cannot be written.
        """
        step_of(version)
        try:
            write_tokasaurus(cartridge, self.directory / version, self.base_model, self.dtype)
        except FileExistsError as error:
            raise SyncError(f"version {version} was published before: {error}") from error
        except OSError as error:
            raise SyncError(f"version {version} cannot be written: {error}") from error
        self._published.append(version)

    def retire(self, keep: int) -> list[str]:
        if keep < 1:
            raise ConfigError(f"sync_keep={keep}; the served version itself must stay: at least 1")
        gone, self._published = self._published[:-keep], self._published[-keep:]
        for version in gone:
            shutil.rmtree(self.directory / version)
        return gone
