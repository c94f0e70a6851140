"""A cartridge at one moment, as plain tensors: what is published, uploaded and written.

The trainer goes on changing its cartridge in place, so a version that is sent while training goes
on must be a copy. It is taken in the dtype it will be served in, which is also the copy's price.

Needs torch alone: the gateway reads uploads with it where no model library is at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cartridge_distill.cartridge.kv_shape import KvShape, PerLayer
from cartridge_distill.util.errors import CartridgeFormatError

PARTS = ("frozen_keys", "frozen_values", "trainable_keys", "trainable_values")
"""Names of the field's files; each is one ``[1, H, tokens, D]`` tensor per layer."""


@dataclass(frozen=True)
class Snapshot:
    """Keys and values of one version, on the CPU.

    Attributes:
        parts: for each name of :data:`PARTS`, L tensors ``[1, H, tokens, D]``. Keys and values of
            a layer have the same shapes, layers may differ in H and D, and frozen parts hold at
            least one token.
    """

    parts: dict[str, list[Tensor]]

    @classmethod
    def take(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Snapshot:
        """Copies a cartridge's state dict (``frozen_keys.0``, ...).

        Raises:
            CartridgeFormatError: the names or shapes are not those of a cartridge.
        """
        parts: dict[str, list[Tensor]] = {}
        for name in PARTS:
            layers = sum(key.startswith(f"{name}.") for key in tensors)
            try:
                found = [tensors[f"{name}.{layer}"] for layer in range(layers)]
            except KeyError as error:
                raise CartridgeFormatError(
                    f"the layers of {name} are not numbered 0..{layers - 1}: {error} is missing"
                ) from None
            parts[name] = [_copy(tensor, dtype) for tensor in found]
        if sum(map(len, parts.values())) != len(tensors):
            strange = sorted(
                set(tensors) - {f"{n}.{i}" for n in PARTS for i in range(len(tensors))}
            )
            raise CartridgeFormatError(f"these tensors are no cartridge: {strange[:4]}")
        return cls(parts)

    def __post_init__(self) -> None:
        counts = {len(tensors) for tensors in self.parts.values()}
        if sorted(self.parts) != sorted(PARTS) or len(counts) != 1 or counts == {0}:
            raise CartridgeFormatError(
                "a cartridge has frozen and trainable keys and values, as many layers of each; "
                f"got { {name: len(tensors) for name, tensors in self.parts.items()} }"
            )
        frozen, trained = self.parts["frozen_keys"][0], self.parts["trainable_keys"][0]
        for name, tensors in self.parts.items():
            tokens = (frozen if name.startswith("frozen") else trained).shape[2:3]
            for layer, tensor in enumerate(tensors):
                # Heads and head size are a layer's own, the tokens are those of all.
                like = self.parts["frozen_keys"][layer].shape
                want = (1, *like[1:2], *tokens, *like[3:])
                if tensor.dim() != 4 or tuple(tensor.shape) != want:
                    raise CartridgeFormatError(
                        f"layer {layer} of {name} is {tuple(tensor.shape)}; expected "
                        f"[1, kv_heads, tokens, head_dim], {want}: the tokens of layer 0, heads "
                        "and head size of the layer's frozen keys"
                    )
        if not frozen.shape[2]:
            raise CartridgeFormatError("at least one token must be frozen")

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """``("frozen_keys.0", tensor)``, ... in one fixed order."""
        for name in PARTS:
            for layer, tensor in enumerate(self.parts[name]):
                yield f"{name}.{layer}", tensor

    def layers(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values, L tensors ``[1, H, P, D]`` each, frozen tokens first."""

        def join(kind: str) -> list[Tensor]:
            pairs = zip(self.parts[f"frozen_{kind}"], self.parts[f"trainable_{kind}"], strict=True)
            return [_joined(*pair) for pair in pairs]

        return join("keys"), join("values")

    @property
    def num_layers(self) -> int:
        """L: layers that have keys and values of their own."""
        return len(self.parts["frozen_keys"])

    @property
    def num_frozen_tokens(self) -> int:
        """How many of the first tokens are never trained."""
        return self.parts["frozen_keys"][0].shape[2]

    @property
    def num_tokens(self) -> int:
        """P, frozen tokens included."""
        return self.num_frozen_tokens + self.parts["trainable_keys"][0].shape[2]

    @property
    def kv_shape(self) -> KvShape:
        """Layers, heads and head sizes."""
        keys = self.parts["frozen_keys"]
        heads, sizes = (tuple(key.shape[axis] for key in keys) for axis in (1, 3))
        return KvShape(len(keys), heads, sizes)

    @property
    def kv_heads(self) -> PerLayer:
        """H; one number a layer where layers differ."""
        return self.kv_shape.kv_heads

    @property
    def head_dim(self) -> PerLayer:
        """D; one number a layer where layers differ."""
        return self.kv_shape.head_dim

    @property
    def dtype(self) -> torch.dtype:
        """Of all tensors."""
        return self.parts["frozen_keys"][0].dtype

    @property
    def num_bytes(self) -> int:
        """Of all tensors' numbers."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.items())

    def check_finite(self) -> None:
        """Refuses NaN and infinity.

        Raises:
            CartridgeFormatError: naming the first tensor that holds one.
        """
        for name, tensor in self.items():
            if not all_finite(tensor):
                raise CartridgeFormatError(f"{name} holds values that are not finite")


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """On the CPU, in memory of its own also where dtype and device are right already."""
    source = tensor.detach()
    if source.device.type != "cpu":
        source = source.to(dtype)  # there, so that fewer bytes come over
    return torch.empty(source.shape, dtype=dtype).copy_(source)


def _joined(frozen: Tensor, trained: Tensor) -> Tensor:
    """Along the tokens. For bfloat16 on a CPU ``torch.cat`` takes eight times as long as copies."""
    first, tokens = frozen.shape[2], frozen.shape[2] + trained.shape[2]
    whole = frozen.new_empty(*frozen.shape[:2], tokens, frozen.shape[3])
    whole[:, :, :first] = frozen
    whole[:, :, first:] = trained
    return whole


def all_finite(tensor: Tensor) -> bool:
    """In a tenth of the time of ``isfinite().all()``, which writes tensors as large as this one.

    The least and the largest number are NaN where one is.
    """
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def split_layers(keys: list[Tensor], values: list[Tensor], frozen: int) -> dict[str, list[Tensor]]:
    """The reverse of :meth:`Snapshot.layers`: the first ``frozen`` tokens become the frozen part.

    Args:
        keys: L tensors ``[1, H, P, D]``.
        values: as ``keys``.
        frozen: tokens of the frozen part.
    """
    return {
        "frozen_keys": [tensor[:, :, :frozen].contiguous() for tensor in keys],
        "frozen_values": [tensor[:, :, :frozen].contiguous() for tensor in values],
        "trainable_keys": [tensor[:, :, frozen:].contiguous() for tensor in keys],
        "trainable_values": [tensor[:, :, frozen:].contiguous() for tensor in values],
    }
