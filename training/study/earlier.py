"""The cartridges before the one that is trained: with ``async_steps``, they write the rollouts.

A plain loop asks for nothing ahead, so nothing is stale by chance: the batch of step k is written
by the version that veRL's trainer serves when it begins step k - S, the first S by the initial one.
Each batch is as old as ``async_steps=S`` lets it be.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, load_cartridge, save_cartridge
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.distill.on_policy import oldest_step
from cartridge_distill.util.errors import CartridgeFormatError

FOLDER = "earlier"


class Earlier:
    """The last S cartridges before the one that is trained.

    Args:
        async_steps: S; 0 keeps none.
    """

    def __init__(self, async_steps: int) -> None:
        self._async_steps = async_steps
        self._kept: dict[int, TrainableCache] = {}

    def writes(self, version: int, cartridge: TrainableCache) -> tuple[int, TrainableCache]:
        """The version that writes the next batch, and its cartridge.

        Args:
            version: of ``cartridge``, which is trained next.
        """
        oldest = oldest_step(version + 1, self._async_steps)
        return oldest, cartridge if oldest == version else self._kept[oldest]

    def remember(self, version: int, cartridge: TrainableCache) -> None:
        """Takes a copy, before the optimizer moves the cartridge; the oldest goes."""
        if self._async_steps:
            self._kept[version] = copy.deepcopy(cartridge)
            self._kept.pop(version - self._async_steps, None)

    def save(self, state: Path, model: str) -> None:
        """Writes what is kept beside a run's save, before that is written.

        Args:
            model: the base they are for, its folder or hub id.
        """
        for version, cartridge in self._kept.items():
            if not _place(state, version).exists():
                meta = CartridgeMeta(base_model=model, step=version)
                save_cartridge(cartridge, _place(state, version), meta)

    def forget_files(self, state: Path) -> None:
        """Removes what a save needed that is replaced now."""
        for folder in (state.parent / FOLDER).glob("[0-9]*"):
            if folder.name not in {f"{version:06d}" for version in self._kept}:
                shutil.rmtree(folder)

    def restore(self, state: Path, version: int, each: Callable[[int, Prefix], None]) -> None:
        """Reads what belongs to a save.

        Args:
            version: of the save.
            each: told of every version and its prefix.

        Raises:
            CartridgeFormatError: one is missing or damaged.
        """
        self._kept.clear()
        for before in range(max(0, version - self._async_steps), version):
            place = _place(state, before)
            if not place.is_dir():
                raise CartridgeFormatError(
                    f"{place} is not there, and rollouts of that version are still to be trained "
                    f"on; fix: remove {state.parent}, and the run starts afresh"
                )
            self._kept[before] = load_cartridge(place)
            each(before, self._kept[before].prefix())


def _place(state: Path, version: int) -> Path:
    return state.parent / FOLDER / f"{version:06d}"
