"""Which model is it? Two names for a model's content, and whether a cartridge is of this one.

``weights_fingerprint``  of a sample of the weights, in a second: equal for the same weights in
                         another kind of file, in other shards, under another path, and in another
                         dtype as far as the numbers are the same in bfloat16. It travels with a
                         cartridge. A model of the same shape takes a cartridge of another without
                         a complaint, and answers nonsense; this is what tells them apart.
``model_identity``       of every byte of every file of the folder, tokenizer included: what kept
                         answers of a teacher depend on.

A fingerprint is no proof against somebody who makes two models that agree in the sample.

Not here: whether weights changed while a run trains (:mod:`cartridge_distill.distill.integrity`,
which sums all of them where they lie).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cartridge_distill.model.reading import reading
from cartridge_distill.model.weight_files import samples, weight_files
from cartridge_distill.util.errors import CartridgeFormatError, ConfigError

_VERSION = "weights1"
# What classes and releases of transformers put before the names of the same tensors.
_PREFIXES = {"model", "language_model", "transformer", "base_model"}
# Beside the decoder, which alone reads a cartridge; a text model is saved without them.
_BESIDE = {
    *("vision_tower", "vision_model", "visual", "multi_modal_projector", "embed_vision"),
    *("audio_tower", "embed_audio"),
}
# Float16 has fewer bits for what is smaller than this.
_SMALLEST = 2.0**-14


class OtherModel(CartridgeFormatError):
    """A cartridge was trained with other weights than those of the model it is to be used with."""


class SaysItsModel(Protocol):
    """What a cartridge says of its model (:class:`CartridgeMeta`)."""

    @property
    def base_model(self) -> str | None: ...

    @property
    def model_fingerprint(self) -> str | None: ...


def weights_fingerprint(name_or_path: str | Path, commit: str | None = None) -> str | None:
    """A short name for a model's weights, from a sample of each tensor of its decoder.

    Args:
        name_or_path: folder or hub id.
        commit: of a hub id, as transformers' config knows it.

    Returns:
        None where no weights of a known kind are on this machine: a hub id that was not downloaded
        yet, a folder with another kind of file.

    Raises:
        ConfigError: a file of weights cannot be read.
    """
    found: dict[str, str] = {}
    with reading(name_or_path, "weights"):
        files = weight_files(name_or_path, commit)
        for file in files:
            for sample in samples(file):
                name = _known_as(sample.name)
                if name is not None:
                    content = hashlib.sha256(_comparable(sample.numbers)).hexdigest()
                    found[name] = f"{list(sample.shape)} {content}"
    if not found:
        return None
    # Embeddings that the output layer shares are saved once or twice.
    head = found.pop("lm_head.weight", None)
    if head is not None and head not in found.values():
        found["lm_head.weight"] = head
    digest = hashlib.sha256("".join(f"{n} {c}\n" for n, c in sorted(found.items())).encode())
    return f"{_VERSION}:{digest.hexdigest()[:32]}"


def _known_as(name: str) -> str | None:
    """A tensor's name without what differs from class to class; None for what is left out."""
    parts = name.split(".")
    while parts[0] in _PREFIXES and len(parts) > 1:
        parts = parts[1:]
    # inv_freq: older files keep what the config says.
    return None if parts[0] in _BESIDE or parts[-1] == "inv_freq" else ".".join(parts)


def _comparable(numbers: npt.NDArray[np.float32 | np.uint8]) -> bytes:
    """The same bytes for the same numbers in float32, bfloat16 and float16, rounding aside."""
    if numbers.dtype != np.float32:
        return numbers.tobytes()
    whole = np.nan_to_num(numbers, nan=0.0)
    bits = np.where(np.abs(whole) < _SMALLEST, np.float32(0), whole).view(np.uint32)
    # To the nearest bfloat16, of two to the even one.
    rounded = (bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16
    return rounded.astype("<u2").tobytes()


def check_same_weights(
    meta: SaysItsModel, source: object, model: str, *, allow_other: bool = False
) -> str | None:
    """Whether a cartridge was trained with the weights of this model.

    Args:
        meta: what the cartridge says.
        source: the cartridge, for messages.
        model: folder or hub id of the model it is to be used with.
        allow_other: other weights are meant.

    Returns:
        None where it was; else what a user must be told: it is not known, or it was not and
        ``allow_other`` lets that pass.

    Raises:
        OtherModel: it was not.
        ConfigError: the model's weights cannot be read.
    """
    if meta.model_fingerprint is None:
        return (
            f"{source} does not say which weights it was trained with (an older version or another "
            f"program wrote it); whether they are those of {model} was not checked"
        )
    if not meta.model_fingerprint.startswith(f"{_VERSION}:"):
        return (
            f"{source} has a fingerprint of another kind ({meta.model_fingerprint:.60}); whether "
            f"its weights are those of {model} was not checked"
        )
    here = weights_fingerprint(model)
    if here is None:
        return f"the weights of {model} are not on this machine yet; {source} was not checked"
    if here == meta.model_fingerprint:
        return None
    said = (
        f"{source} was trained with other weights than those of {model} (fingerprints "
        f"{meta.model_fingerprint}, {here})"
    )
    if allow_other:
        return f"{said}: its answers may mean nothing"
    named = f", {meta.base_model}" if meta.base_model not in (None, model) else ""
    raise OtherModel(
        f"{said}; its answers would mean nothing; fix: give the model that it was trained "
        f"with{named}, or --allow-other-model if this one is meant"
    )


def model_identity(name_or_path: str | Path, commit: str | None = None) -> str:
    """What stands for a model's content: other weights, other identity; another path, the same.

    Args:
        name_or_path: a folder, of which every file is read (a gigabyte a second or so), or a hub
            id.
        commit: of the hub id, as transformers' config knows it.

    Raises:
        ConfigError: a hub id without a commit.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        if commit is None:
            raise ConfigError(
                f"{str(name_or_path)!r} is no folder, and its revision on the Hub is not known, so "
                "answers cannot be kept for it; fix: give the folder of a snapshot as model.path, "
                "or no teacher_cache"
            )
        return f"{name_or_path}@{commit}"
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        with file.open("rb") as handle:
            content = hashlib.file_digest(handle, "sha256").hexdigest()
        digest.update(f"{file.name} {content}\n".encode())
    return f"sha256:{digest.hexdigest()}"
