"""Cartridges on disk: our own directory, Tokasaurus' directory, and the field's ``.pt`` files.

========================  =====================================  ==========
format                    files                                  direction
========================  =====================================  ==========
our own directory         ``cartridge.safetensors`` + ``.json``  both
Tokasaurus directory      ``cartridge.pt`` + ``config.yaml``     both
HazyResearch ``.pt``      one file, both spellings of "frozen"   read
Hugging Face repo id      any of the above in a repository       read
========================  =====================================  ==========

Reading never runs pickled code: ``.pt`` files go through ``weights_only=True`` with
``nn.ParameterList`` alone allow-listed. Writing is atomic: a reader sees a whole directory or none.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cartridge_distill.cartridge import TrainableCache
from cartridge_distill.errors import CartridgeFormatError
from cartridge_distill.prefix import Prefix
from cartridge_distill.snapshot import Snapshot
from cartridge_distill.tokasaurus_dir import (
    TOKASAURUS_CONFIG,
    TOKASAURUS_WEIGHTS,
    replace_directory,
    write_snapshot,
)

WEIGHTS_FILE = "cartridge.safetensors"
META_FILE = "cartridge.json"
# The two spellings in the field: mid-2025 and since August 2025 (which is ours, too).
_FROZEN_NAMES = (("fixed_keys", "fixed_values"), ("frozen_keys", "frozen_values"))


@dataclass
class CartridgeMeta:
    """What a cartridge was made from and for; written beside the weights."""

    base_model: str
    step: int = 0
    version: str | None = None
    document_sha256: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)


def save_cartridge(cartridge: TrainableCache, directory: str | Path, meta: CartridgeMeta) -> Path:
    """Writes our own format: float32 safetensors and a JSON file that a person can read."""
    key = cartridge.frozen_keys[0]
    described = {
        "format": "cartridge-distill/1",
        "num_tokens": cartridge.num_tokens,
        "num_frozen_tokens": cartridge.num_frozen_tokens,
        "num_layers": cartridge.num_layers,
        "kv_heads": key.shape[1],
        "head_dim": key.shape[3],
        "dtype": "float32",
        **asdict(meta),
    }

    def write(scratch: Path) -> None:
        tensors = {
            name: t.detach().cpu().contiguous() for name, t in cartridge.state_dict().items()
        }
        save_file(tensors, scratch / WEIGHTS_FILE)
        (scratch / META_FILE).write_text(json.dumps(described, indent=2, default=str) + "\n")

    replace_directory(Path(directory), write, overwrite=True)
    return Path(directory)


def read_meta(directory: str | Path) -> dict[str, Any]:
    """The JSON beside a cartridge in our own format."""
    path = Path(directory) / META_FILE
    if not path.is_file():
        raise CartridgeFormatError(f"{path} is not there; {directory} is no cartridge of ours")
    meta: dict[str, Any] = json.loads(path.read_text())
    return meta


def write_tokasaurus(
    cartridge: TrainableCache,
    directory: str | Path,
    base_model: str,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes what a Tokasaurus server reads for ``source: "local"``, see ``tokasaurus_dir``.

    Raises:
        FileExistsError: the directory is there; the server never loads an id twice.
    """

    snapshot = Snapshot.take(cartridge.state_dict(), dtype)
    return write_snapshot(snapshot, directory, base_model)


def load_pt(path: str | Path) -> TrainableCache:
    """Reads a ``.pt`` file of either spelling without running pickled code.

    Raises:
        CartridgeFormatError: not such a file, or one that holds other objects than tensors.
    """
    try:
        with torch.serialization.safe_globals([nn.ParameterList, nn.Parameter]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CartridgeFormatError(
            f"{path} cannot be read safely as a cartridge: {error}"
        ) from error
    if not isinstance(data, dict):
        raise CartridgeFormatError(
            f"{path} holds a {type(data).__name__}, expected a dict of KV lists"
        )
    spelling = next((names for names in _FROZEN_NAMES if names[0] in data), None)
    if spelling is None:
        raise CartridgeFormatError(
            f"{path} has neither fixed_keys nor frozen_keys (it has {sorted(map(str, data))}); "
            "a cartridge has at least one frozen token"
        )
    frozen_keys, frozen_values = spelling
    names = ("trainable_keys", "trainable_values", frozen_keys, frozen_values)
    missing = [name for name in names if name not in data]
    if missing:
        raise CartridgeFormatError(f"{path} lacks {missing}")
    parts = {name: list(data[name]) for name in names}
    for name, tensors in parts.items():
        if not all(isinstance(t, Tensor) and t.dim() == 4 for t in tensors):
            raise CartridgeFormatError(
                f"{path}: {name} must be a list of [1, H, tokens, D] tensors"
            )
    return _from_parts(
        parts[frozen_keys],
        parts[frozen_values],
        parts["trainable_keys"],
        parts["trainable_values"],
        str(path),
    )


def _from_parts(
    frozen_keys: list[Tensor],
    frozen_values: list[Tensor],
    trainable_keys: list[Tensor],
    trainable_values: list[Tensor],
    source: str,
) -> TrainableCache:
    counts = {len(x) for x in (frozen_keys, frozen_values, trainable_keys, trainable_values)}
    if len(counts) != 1 or counts == {0}:
        raise CartridgeFormatError(f"{source}: the four lists hold {sorted(counts)} layers")
    for layer, tensors in enumerate(
        zip(frozen_keys, trainable_keys, frozen_values, trainable_values, strict=True)
    ):
        if not all(bool(torch.isfinite(t).all()) for t in tensors):
            raise CartridgeFormatError(f"{source}: layer {layer} holds values that are not finite")
    try:
        # Token counts are read from axis 2: newer upstream code takes axis 1, the heads.
        prefix = Prefix(
            [torch.cat(pair, dim=2) for pair in zip(frozen_keys, trainable_keys, strict=True)],
            [torch.cat(pair, dim=2) for pair in zip(frozen_values, trainable_values, strict=True)],
        )
    except RuntimeError as error:
        raise CartridgeFormatError(
            f"{source}: frozen and trainable parts do not join: {error}"
        ) from error
    return TrainableCache(prefix, frozen_keys[0].shape[2])


def load_safetensors(directory: str | Path) -> TrainableCache:
    """Reads our own format."""
    path = Path(directory) / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CartridgeFormatError(f"{path} cannot be read: {error}") from error

    def layers(name: str) -> list[Tensor]:
        count = sum(key.startswith(f"{name}.") for key in tensors)
        try:
            return [tensors[f"{name}.{layer}"] for layer in range(count)]
        except KeyError as error:
            raise CartridgeFormatError(
                f"{path}: layers of {name} are not numbered 0..n: {error}"
            ) from None

    return _from_parts(
        layers("frozen_keys"),
        layers("frozen_values"),
        layers("trainable_keys"),
        layers("trainable_values"),
        str(path),
    )


def load_tokasaurus(directory: str | Path) -> TrainableCache:
    """Reads a Tokasaurus directory and checks it as the server does.

    Raises:
        CartridgeFormatError: a file is missing, or the token counts of the two files differ.
    """
    directory = Path(directory)
    config_path = directory / TOKASAURUS_CONFIG
    for path in (directory / TOKASAURUS_WEIGHTS, config_path):
        if not path.is_file():
            raise CartridgeFormatError(f"{path} is missing")
    config = yaml.safe_load(config_path.read_text())
    initializer = (config or {}).get("kv_cache_initializer") or {}
    initializer = initializer.get("value", initializer)
    declared = initializer.get("max_tokens")
    cartridge = load_pt(directory / TOKASAURUS_WEIGHTS)
    if declared != cartridge.num_tokens:
        raise CartridgeFormatError(
            f"{config_path}: kv_cache_initializer.max_tokens={declared}, "
            f"but cartridge.pt holds {cartridge.num_tokens} tokens"
        )
    return cartridge


def load_cartridge(source: str | Path) -> TrainableCache:
    """Reads a cartridge from a ``.pt`` file, a directory of ours or Tokasaurus', or a hub id.

    Raises:
        CartridgeFormatError: nothing readable is there.
    """
    path = Path(source)
    if path.is_file():
        return load_pt(path)
    if path.is_dir():
        if (path / WEIGHTS_FILE).is_file():
            return load_safetensors(path)
        if (path / TOKASAURUS_WEIGHTS).is_file():
            return load_tokasaurus(path)
        files = sorted(path.glob("*.pt"))
        if len(files) == 1:
            return load_pt(files[0])
        raise CartridgeFormatError(
            f"{path} holds neither {WEIGHTS_FILE} nor {TOKASAURUS_WEIGHTS}, "
            f"and {len(files)} .pt files"
        )
    if str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        return load_cartridge(
            snapshot_download(
                str(source), allow_patterns=["*.pt", "*.safetensors", "*.json", "*.yaml"]
            )
        )
    raise CartridgeFormatError(f"{source} is no file, no directory and no hub id (owner/name)")
