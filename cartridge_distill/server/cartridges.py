"""Cartridges the server holds: loaded once per id, never again.

The real server keeps a set of loaded ids and never loads an id twice, whatever
``force_redownload`` says: **the weights behind an id never change while the server lives**. So it
is here. A client that overwrites one id keeps getting the first version, here as in production. An
id of which nobody ever had an answer, because its weights overflow, is the one exception: it is
forgotten.

Memory is bounded: past the bound the least recently used id is dropped. It is still "loaded" in the
sense above, so a later request for it is refused (the real server would read blocks that by then
hold something else).

Nothing is downloaded. An id with source ``wandb`` or ``huggingface`` is served when its directory
is there already, as the real server does, and refused otherwise.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cartridge_distill.cartridge.checkpoint import load_pt_prefix
from cartridge_distill.cartridge.compose import join_layers
from cartridge_distill.cartridge.formats.tokasaurus import (
    TOKASAURUS_CONFIG,
    TOKASAURUS_WEIGHTS,
    declared_tokens,
    read_config,
)
from cartridge_distill.cartridge.kv_shape import PAGE_TOKENS, check_fits
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.rollout.protocol import CartridgeRef, sanitise_cartridge_id
from cartridge_distill.util.disk import DiskFailed, reading_disk
from cartridge_distill.util.errors import CartridgeDistillError, CartridgeFormatError

logger = logging.getLogger(__name__)


class CartridgeRefused(CartridgeDistillError):
    """A cartridge cannot be served; the message goes to the client with HTTP 400."""


class CartridgeStore:
    """Prefixes by cartridge id. Safe to call from several threads.

    Args:
        directory: holds ``{sanitised id}/cartridge.pt`` and ``config.yaml``.
        model: the prefixes take its shape, dtype and device.
        memory_bytes: bound on the keys and values kept; one cartridge always fits.
    """

    def __init__(self, directory: Path, model: nn.Module, memory_bytes: int) -> None:
        self._directory = directory
        self._config: Any = model.config
        parameter = next(model.parameters())
        self._dtype, self._device = parameter.dtype, parameter.device
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, ...], Prefix] = OrderedDict()
        self._ever_loaded: set[str] = set()
        self._used: set[str] = set()

    @property
    def loaded_ids(self) -> list[str]:
        """Every id that was ever loaded, sorted."""
        with self._lock:
            return sorted(self._ever_loaded)

    def prefix(self, refs: Sequence[CartridgeRef]) -> Prefix | None:
        """The joined prefix of some cartridges, in alphabetical order of id; None for none.

        Raises:
            CartridgeRefused: missing, malformed, not for this model, or dropped from memory.
            DiskFailed: the disk does not give it.
        """
        ids = tuple(sorted(ref.id for ref in refs))
        if not ids:
            return None
        sources = {ref.id: ref.source for ref in refs}
        with self._lock:
            if ids in self._kept:
                self._kept.move_to_end(ids)
                return self._kept[ids]
            parts = [self._single(cartridge_id, sources[cartridge_id]) for cartridge_id in ids]
            if len(parts) == 1:
                return parts[0]
            if (size := sum(map(_num_bytes, parts))) > self._memory_bytes:
                raise CartridgeRefused(
                    f"{len(ids)} cartridges are together {size / 1e9:.2f} GB, over the bound of "
                    f"{self._memory_bytes / 1e9:.2f} GB; ask for fewer, or start the server with a "
                    "larger --cartridge-memory-gb"
                )
            joined = Prefix(*join_layers([(part.keys, part.values) for part in parts]))
            self._keep(ids, joined)
            return joined

    def used(self, ids: Iterable[str]) -> None:
        """These have given an answer: from here on each stands for its weights."""
        with self._lock:
            self._used.update(ids)

    def forget_unused(self, ids: Iterable[str]) -> None:
        """Forgets those of which nobody ever had an answer; they are read anew when asked for.

        Whoever put weights there that overflow can put better ones under the same id.
        """
        with self._lock:
            gone = set(ids) - self._used
            self._ever_loaded -= gone
            for kept in [kept for kept in self._kept if gone.intersection(kept)]:
                del self._kept[kept]

    def _single(self, cartridge_id: str, source: str) -> Prefix:
        key = (cartridge_id,)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if cartridge_id in self._ever_loaded:
            raise CartridgeRefused(
                f"cartridge {cartridge_id!r} was loaded and has been dropped from memory since; an "
                "id is never loaded twice. Publish it under a new id, or start the server with a "
                "larger --cartridge-memory-gb"
            )
        prefix = self._read(cartridge_id, source)
        self._ever_loaded.add(cartridge_id)
        self._keep(key, prefix)
        logger.info("loaded cartridge %s: %d tokens", cartridge_id, prefix.num_tokens)
        return prefix

    def _keep(self, ids: tuple[str, ...], prefix: Prefix) -> None:
        self._kept[ids] = prefix
        bound = self._memory_bytes
        while len(self._kept) > 1 and sum(map(_num_bytes, self._kept.values())) > bound:
            dropped, _ = self._kept.popitem(last=False)
            logger.warning("dropped cartridge %s from memory", " + ".join(dropped))

    def _read(self, cartridge_id: str, source: str) -> Prefix:
        folder = self._folder(cartridge_id, source)
        try:
            prefix = load_pt_prefix(folder / TOKASAURUS_WEIGHTS)
            check_fits(prefix.kv_shape, self._config)
        except DiskFailed:
            raise
        except (CartridgeFormatError, OSError) as error:
            raise CartridgeRefused(f"cartridge {cartridge_id!r}: {error}") from error
        tokens = prefix.num_tokens
        stated = _stated_tokens(folder / TOKASAURUS_CONFIG, cartridge_id)
        if stated != tokens:
            raise CartridgeRefused(
                f"cartridge {cartridge_id!r}: config.yaml says kv_cache_initializer.max_tokens="
                f"{stated}, cartridge.pt holds {tokens} tokens; they must be equal"
            )
        if tokens % PAGE_TOKENS:
            raise CartridgeRefused(
                f"cartridge {cartridge_id!r} has {tokens} tokens, not a multiple of {PAGE_TOKENS}. "
                "On the real server this kills the model worker process. Use "
                f"{-(-tokens // PAGE_TOKENS) * PAGE_TOKENS} tokens"
            )
        return _contiguous(prefix, self._device, self._dtype)

    def _folder(self, cartridge_id: str, source: str) -> Path:
        """The cartridge's folder, certain to lie in the cartridge directory with both files."""
        try:
            with reading_disk(self._directory):
                root = self._directory.resolve()
                folder = root / sanitise_cartridge_id(cartridge_id)
                files = [folder / TOKASAURUS_WEIGHTS, folder / TOKASAURUS_CONFIG]
                missing = [file.name for file in files if not file.is_file()]
                outside = [file for file in files if not file.resolve().is_relative_to(root)]
        except DiskFailed:
            raise
        except (OSError, ValueError) as error:
            # A name too long for the file system, or an empty one.
            raise CartridgeRefused(f"cartridge id {cartridge_id[:80]!r}: {error}") from error
        if missing:
            fix = (
                "publish it there first"
                if source == "local"
                else f"this server downloads nothing, so source {source!r} works only for a "
                "cartridge that is there already"
            )
            raise CartridgeRefused(
                f"cartridge {cartridge_id!r}: no {' and no '.join(missing)} in "
                f"{folder.name}/ of the cartridge directory; {fix}"
            )
        if outside:
            raise CartridgeRefused(
                f"cartridge {cartridge_id!r}: {outside[0].name} is a link out of the cartridge "
                "directory, which is not followed"
            )
        return folder


def _stated_tokens(path: Path, cartridge_id: str) -> int:
    """``kv_cache_initializer.max_tokens`` of config.yaml, in either of its two places."""
    try:
        with reading_disk(path):
            tokens = declared_tokens(read_config(path))
    except DiskFailed:
        raise
    except (OSError, CartridgeFormatError) as error:
        raise CartridgeRefused(f"cartridge {cartridge_id!r}: config.yaml: {error}") from error
    if type(tokens) is int:
        return tokens
    raise CartridgeRefused(
        f"cartridge {cartridge_id!r}: config.yaml has no kv_cache_initializer.max_tokens"
    )


def _contiguous(prefix: Prefix, device: torch.device, dtype: torch.dtype) -> Prefix:
    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype).contiguous()

    return Prefix([placed(key) for key in prefix.keys], [placed(value) for value in prefix.values])


def _num_bytes(prefix: Prefix) -> int:
    tensors = (*prefix.keys, *prefix.values)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
