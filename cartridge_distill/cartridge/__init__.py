"""Keys and values that stand in for a document: data, trainable, files. No model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cartridge_distill.cartridge.trainable import TrainableCache

__all__ = ["TrainableCache"]


def __getattr__(name: str) -> object:
    # On demand: files are read where there is no transformers, by the gateway for example.
    if name == "TrainableCache":
        from cartridge_distill.cartridge.trainable import TrainableCache

        return TrainableCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
