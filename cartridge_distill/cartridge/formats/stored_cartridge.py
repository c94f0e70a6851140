"""What lies between two formats: the tensors as stored, and what is known about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from cartridge_distill.cartridge.kv_shape import described
from cartridge_distill.cartridge.snapshot import PARTS, Snapshot
from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.secrecy import clean_settings

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_FROZEN_TOKEN = (
    "it has no frozen token. Upstream's reader and Tokasaurus both stop at a cartridge without "
    "one; save it with num_frozen_tokens=1 or more"
)


@dataclass
class CartridgeMeta:
    """What a cartridge was made from and for.

    Attributes:
        base_model: hub id or folder; None where the file does not say.
        base_revision: commit of the base model on the Hub.
        step: optimizer steps behind it.
        version: the id it was served under, when it was.
        document_title, document_sha256: of the document it stands for.
        recipe: settings of the training, by their names in the configuration.
        metrics: ``curve``, rows such as ``{"step": 1, "loss": 1.2}``, see ``curve``; ``last_step``,
            the numbers of the last one; ``results``, rows such as those of ``evaluate --json``;
            anything else is kept and not shown.
        model_fingerprint: of the weights it was trained with, see
            :func:`cartridge_distill.model.identity.weights_fingerprint`; None where nobody said.
    """

    base_model: str | None
    step: int = 0
    version: str | None = None
    document_sha256: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    base_revision: str | None = None
    document_title: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    model_fingerprint: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the JSON; a credential is never written."""
        found: dict[str, Any] = clean_settings(asdict(self))
        return found

    def cleaned(self) -> CartridgeMeta:
        """The same, as it may be shown."""
        return CartridgeMeta(**self.as_dict())

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> CartridgeMeta:
        """From the JSON's entries about it; whether there are others is the reader's question.

        Raises:
            CartridgeFormatError: an entry is not of the type it should be.
        """
        known = {f.name for f in fields(cls)} & described.keys()
        for name in known:
            wanted: tuple[type, ...] = (str, type(None))
            if name in ("recipe", "metrics"):
                wanted = (dict,)
            elif name == "step":
                wanted = (int,)
            if not isinstance(described[name], wanted):
                raise CartridgeFormatError(
                    f"{name} is {described[name]!r:.60}, expected {wanted[0].__name__}"
                )
        return cls(**{"base_model": None} | {name: described[name] for name in known})


@dataclass(frozen=True)
class StoredCartridge:
    """A cartridge as it lies on disk.

    Attributes:
        snapshot: the tensors, in the dtype of the file.
        meta: what the file says about them.
        sha256: of the tensors, which the file had and which was compared; None where it had none.
    """

    snapshot: Snapshot
    meta: CartridgeMeta
    sha256: str | None = None

    def shape(self) -> dict[str, int | list[int]]:
        """The numbers that must agree with a model, and the token counts.

        Heads and head size are lists, one number a layer, where layers differ.
        """
        snapshot = self.snapshot
        return {
            "num_tokens": snapshot.num_tokens,
            "num_frozen_tokens": snapshot.num_frozen_tokens,
            "num_layers": snapshot.num_layers,
            "kv_heads": described(snapshot.kv_heads),
            "head_dim": described(snapshot.head_dim),
        }

    def dtype_name(self) -> str:
        """``float32``, ``bfloat16`` or ``float16``."""
        return str(self.snapshot.dtype).removeprefix("torch.")

    def to(self, dtype: torch.dtype) -> StoredCartridge:
        """The same in another dtype; rounds where that is narrower.

        Raises:
            CartridgeFormatError: a number is too large for it (float16 ends at 65504).
        """
        parts = {
            name: [tensor.to(dtype) for tensor in tensors]
            for name, tensors in self.snapshot.parts.items()
        }
        snapshot = Snapshot(parts)
        try:
            snapshot.check_finite()
        except CartridgeFormatError as error:
            raise CartridgeFormatError(f"too large for {dtype}: {error}") from None
        return replace(self, snapshot=snapshot, sha256=None)

    def for_model(self, base_model: str | None, revision: str | None = None) -> StoredCartridge:
        """The same, said to be for this model; unchanged where None or its own is given."""
        if base_model is None or base_model == self.meta.base_model:
            return self
        meta = replace(self.meta, base_model=base_model, base_revision=revision)
        return replace(self, meta=meta)

    def base_model(self) -> str:
        """The model it is for.

        Raises:
            CartridgeFormatError: nobody has said.
        """
        if self.meta.base_model is None:
            raise CartridgeFormatError(
                "the cartridge does not say which model it is for (a .pt file cannot); fix: name "
                "the model with base_model"
            )
        return self.meta.base_model


def checked_snapshot(parts: Mapping[str, Sequence[Tensor]], source: str) -> Snapshot:
    """The tensors of a file as a cartridge.

    Args:
        parts: for each name of :data:`cartridge_distill.cartridge.snapshot.PARTS`, one tensor
            ``[1, H, tokens, D]`` per layer.
        source: the file, for messages.

    Returns:
        A snapshot in one dtype: where the tensors have several, the narrowest that holds all.

    Raises:
        CartridgeFormatError: no cartridge, none that can be trained or served, or not finite.
    """
    tensors = [tensor for name in PARTS for tensor in parts[name]]
    strange = {tensor.dtype for tensor in tensors} - set(DTYPES)
    if strange:
        raise CartridgeFormatError(
            f"{source} holds {sorted(map(str, strange))}; a cartridge is float32, bfloat16 or "
            "float16"
        )
    # Token counts are read from axis 2: newer upstream code takes axis 1, the heads.
    for name in PARTS:
        none = not parts[name] or any(t.dim() == 4 and not t.shape[2] for t in parts[name])
        if none and parts["trainable_keys"] and name.startswith("frozen"):
            raise CartridgeFormatError(f"{source}: {NO_FROZEN_TOKEN}")
        if none and parts["frozen_keys"]:
            raise CartridgeFormatError(f"{source}: all its tokens are frozen, nothing is trained")
    try:
        dtypes = [tensor.dtype for tensor in tensors]
        dtype = reduce(torch.promote_types, dtypes) if dtypes else torch.float32
        snapshot = Snapshot(
            {
                name: [tensor.detach().to("cpu", dtype).contiguous() for tensor in parts[name]]
                for name in PARTS
            }
        )
        snapshot.check_finite()
    except CartridgeFormatError as error:
        raise CartridgeFormatError(f"{source}: {error}") from None
    return snapshot
