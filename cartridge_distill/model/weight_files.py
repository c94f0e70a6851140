"""A few numbers out of each tensor of a model's files, of whatever kind; no model is loaded.

Read are the places alone that a fingerprint looks at: some kilobytes of each tensor, so that
gigabytes take a second. A safetensors file says where its tensors lie, and needs no torch, which
takes longer to import; a ``.bin`` file is mapped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCKS, BLOCK = 4, 256
"""From each tensor so many runs of so many numbers, evenly spread; all of a small one."""
# In the order in which transformers looks for them.
_NAMES = ("model.safetensors", "model.safetensors.index.json")
_OLD_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_LARGEST_HEADER = 100 * 2**20
# Bfloat16 is no dtype of numpy's: it is the upper half of a float32.
_BF16: np.dtype[Any] = np.dtype("<u2")
_BYTES: np.dtype[Any] = np.dtype("u1")
_FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": _BF16,
}


@dataclass(frozen=True)
class Sample:
    """Of one tensor of a file.

    Attributes:
        name: as the file has it.
        shape: of the tensor.
        numbers: those at the places of :func:`places`, in float32; the bytes of anything that is
            no plain float.
    """

    name: str
    shape: tuple[int, ...]
    numbers: npt.NDArray[np.float32 | np.uint8]


def places(count: int) -> list[tuple[int, int]]:
    """Which numbers of a tensor of ``count`` are looked at: (first, behind the last), in order."""
    if count <= BLOCKS * BLOCK:
        return [(0, count)] if count else []
    starts = [number * (count - BLOCK) // (BLOCKS - 1) for number in range(BLOCKS)]
    return [(start, start + BLOCK) for start in starts]


def weight_files(name_or_path: str | Path, commit: str | None = None) -> list[Path]:
    """The files with a model's weights, on this machine; nothing is downloaded.

    Args:
        name_or_path: a folder, or a hub id, which is looked up in the Hub's cache.
        commit: of the hub id; by default the newest that the cache knows.

    Returns:
        Empty where there are none of a known kind.
    """

    def found(name: str) -> Path | None:
        folder = Path(name_or_path).expanduser()
        if folder.is_dir():
            return folder / name if (folder / name).is_file() else None
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(str(name_or_path), name, revision=commit)
        return Path(cached) if isinstance(cached, str) else None

    for name in (*_NAMES, *_OLD_NAMES):
        file = found(name)
        if file is None:
            continue
        if file.suffix != ".json":
            return [file]
        shards = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
        parts = [found(str(shard)) for shard in shards]
        return [part for part in parts if part is not None] if all(parts) else []
    return []


def samples(file: Path) -> Iterator[Sample]:
    """Of each tensor of a file.

    Raises:
        ValueError: it is no such file, or ends early.
    """
    return _of_safetensors(file) if file.suffix == ".safetensors" else _of_pickle(file)


def _of_safetensors(file: Path) -> Iterator[Sample]:
    with file.open("rb", buffering=0) as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 2 <= length <= _LARGEST_HEADER:
            raise ValueError(f"{file}: a header of {length} bytes; it is no safetensors file")
        header: dict[str, Any] = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        for name, about in header.items():
            shape = tuple(about["shape"])
            first, end = about["data_offsets"]
            dtype, count = _FLOATS.get(about["dtype"], _BYTES), prod(shape)
            if dtype is _BYTES or end - first != count * dtype.itemsize:
                dtype, count = _BYTES, end - first
            read = bytearray()
            for start, stop in places(count):
                handle.seek(8 + length + first + start * dtype.itemsize)
                read += handle.read((stop - start) * dtype.itemsize)
            if len(read) != sum(stop - start for start, stop in places(count)) * dtype.itemsize:
                raise ValueError(f"{file}: it ends within {name}")
            numbers = np.frombuffer(read, dtype)
            if dtype is _BF16:
                numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
            elif dtype.kind == "f":
                numbers = numbers.astype(np.float32)
            yield Sample(name, shape, numbers)


def _of_pickle(file: Path) -> Iterator[Sample]:
    import torch

    for name, tensor in torch.load(file, map_location="cpu", mmap=True, weights_only=True).items():
        if not isinstance(tensor, torch.Tensor):
            continue
        flat = tensor.detach().reshape(-1)
        is_float = tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        if not is_float:
            flat = flat.contiguous().view(torch.uint8)
        parts = [flat[start:stop] for start, stop in places(flat.numel())]
        found = torch.cat(parts) if parts else flat[:0]
        yield Sample(
            name, tuple(tensor.shape), (found.float() if is_float else found).contiguous().numpy()
        )
