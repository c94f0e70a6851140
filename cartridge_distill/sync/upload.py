"""A cartridge version on the network: one safetensors file that describes itself.

The file's metadata says what is in it (:class:`UploadHeader`), its tensors are those of
:data:`cartridge_distill.cartridge.snapshot.PARTS`. So ``curl -T version.safetensors`` is a complete
upload, and the receiver can refuse it after the first kilobytes: the header alone gives every name,
shape and size. No pickle in either direction.

The SHA-256 of the tensors is in the metadata (``cartridge-version/1``, what a person uploads), or
it follows them as a last tensor (``cartridge-version/2``): a client that hashes while it sends
knows it only then. What arrives is the same version either way.

The header is written here and not by the safetensors library, because the tensors are sent from
where they lie: no second copy of a quarter of a gigabyte. What is written, that library reads, and
the reverse (tested). Format: https://github.com/huggingface/safetensors#format

Needs torch and pydantic alone.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from cartridge_distill.cartridge.kv_shape import KvShape
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.lfs import about, is_pointer
from cartridge_distill.util.strict_json import MAX_PARTS, BadJson, loads

MAX_HEADER_BYTES = 2**20
_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_OF_A_TENSOR = {"dtype", "shape", "data_offsets"}
_COUNT = Field(ge=1, le=2**24)
DIGEST_BYTES = hashlib.sha256().digest_size
_DIGEST = "sha256"
FORMATS = ("cartridge-version/1", "cartridge-version/2")
"""What a receiver of this version reads: the hash in the metadata, or after the tensors."""


def _split(value: object) -> object:
    """``"2,2,1"``, one number a layer, as a tuple; anything else as it is."""
    return tuple(value.split(",")) if isinstance(value, str) and "," in value else value


_PerLayer = Annotated[
    Annotated[int, _COUNT] | tuple[Annotated[int, _COUNT], ...], BeforeValidator(_split)
]


class Description(BaseModel):
    """What an upload says of itself before its tensors come (safetensors metadata, so every value
    is a string there).

    Attributes:
        base_model: the model the cartridge was trained on, as the server calls it.
        step: optimizer steps behind it.
        num_tokens, num_frozen_tokens, num_layers, dtype: its shape.
        kv_heads, head_dim: one number, or one a layer with commas between them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    base_model: str = Field(min_length=1, max_length=512)
    step: int = Field(ge=0, le=2**40)
    num_tokens: int = _COUNT
    num_frozen_tokens: int = _COUNT
    num_layers: int = _COUNT
    kv_heads: _PerLayer
    head_dim: _PerLayer
    dtype: Literal["bfloat16", "float32", "float16"]

    @model_validator(mode="after")
    def _numbers_of_all_layers(self) -> Description:
        for name in ("kv_heads", "head_dim"):
            numbers = getattr(self, name)
            if isinstance(numbers, tuple) and len(numbers) != self.num_layers:
                raise ValueError(f"{name} has {len(numbers)} numbers, num_layers={self.num_layers}")
        return self

    @property
    def kv(self) -> KvShape:
        """What it must have in common with a model."""
        return KvShape(self.num_layers, self.kv_heads, self.head_dim)

    def tensors(self) -> Iterator[tuple[str, list[int]]]:
        """Names and shapes, in the order in which :func:`encode` sends them."""
        trained, kv = self.num_tokens - self.num_frozen_tokens, self.kv
        for part, tokens in (("frozen", self.num_frozen_tokens), ("trainable", trained)):
            for kind in ("keys", "values"):
                for layer in range(self.num_layers):
                    heads, size = kv.layer(layer)
                    yield f"{part}_{kind}.{layer}", [1, heads, tokens, size]

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.num_tokens * self.kv.numbers * _BYTES[self.dtype]


class UploadHeader(Description):
    """A description that holds the hash, as a version has it from its arrival on.

    Attributes:
        sha256: of all tensor bytes, in the order of their offsets. What the gateway keeps and shows
            is in the order of :meth:`tensors`, which is the order in which they are sent here.
    """

    format: Literal["cartridge-version/1"] = "cartridge-version/1"
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class StreamedHeader(Description):
    """A description whose hash follows the tensors: :data:`DIGEST_BYTES` bytes, of the same."""

    format: Literal["cartridge-version/2"] = "cartridge-version/2"


@dataclass(frozen=True)
class Upload:
    """A version to send: what goes over the wire, still lying in the snapshot's memory.

    Attributes:
        digest: SHA-256 of the tensors, which follows them; None where the header holds it.
    """

    header: Description
    head: bytes
    buffers: list[memoryview]
    digest: Future[bytes] | None = None

    @property
    def num_bytes(self) -> int:
        """Of the whole file."""
        follows = DIGEST_BYTES if self.digest is not None else 0
        return len(self.head) + self.header.data_bytes + follows

    def chunks(self, size: int = 2**20) -> Iterator[bytes | memoryview]:
        """The file in pieces of at most ``size`` bytes; but for the digest, which comes later."""
        yield self.head
        for buffer in self.buffers:
            for start in range(0, len(buffer), size):
                yield buffer[start : start + size]


def encode(snapshot: Snapshot, base_model: str, step: int) -> Upload:
    """Describes a snapshot; copies nothing, hashes everything once, before it is sent."""
    return with_digest(snapshot, base_model, step, sha256(snapshot))


def with_digest(snapshot: Snapshot, base_model: str, step: int, digest: bytes) -> Upload:
    """As :func:`encode`, where :func:`sha256` is known already."""
    described = _described(snapshot, base_model, step)
    header = UploadHeader.model_validate({**described, "sha256": digest.hex()})
    return Upload(header, _head(header, snapshot), _buffers(snapshot))


def streamed(snapshot: Snapshot, base_model: str, step: int, digest: Future[bytes]) -> Upload:
    """Describes a snapshot whose hash is not known yet; copies nothing, hashes nothing.

    Args:
        digest: will be :func:`sha256` of the same snapshot.
    """
    header = StreamedHeader.model_validate(_described(snapshot, base_model, step))
    return Upload(header, _head(header, snapshot), _buffers(snapshot), digest)


def sha256(snapshot: Snapshot) -> bytes:
    """Of all tensor bytes, in the order in which they are sent."""
    digest = hashlib.sha256()
    for buffer in _buffers(snapshot):
        digest.update(buffer)
    return digest.digest()


def _buffers(snapshot: Snapshot) -> list[memoryview]:
    tensors = [tensor for _, tensor in snapshot.items()]
    return [memoryview(tensor.view(torch.uint8).numpy().reshape(-1).data) for tensor in tensors]


def _described(snapshot: Snapshot, base_model: str, step: int) -> dict[str, object]:
    return {
        "base_model": base_model,
        "step": step,
        "num_tokens": snapshot.num_tokens,
        "num_frozen_tokens": snapshot.num_frozen_tokens,
        "num_layers": snapshot.num_layers,
        "kv_heads": snapshot.kv_heads,
        "head_dim": snapshot.head_dim,
        "dtype": str(snapshot.dtype).removeprefix("torch."),
    }


def _head(header: Description, snapshot: Snapshot) -> bytes:
    """The file's beginning, up to its first tensor."""
    entries: dict[str, Any] = {"__metadata__": {name: _text(value) for name, value in header}}
    offset = 0
    for name, tensor in snapshot.items():
        entries[name] = {
            "dtype": _SAFETENSORS_DTYPES[header.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    if isinstance(header, StreamedHeader):
        entries[_DIGEST] = _digest_entry(header)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin aligned
    return struct.pack("<Q", len(text)) + text


def _digest_entry(header: Description) -> dict[str, Any]:
    offsets = [header.data_bytes, header.data_bytes + DIGEST_BYTES]
    return {"dtype": "U8", "shape": [DIGEST_BYTES], "data_offsets": offsets}


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class Head:
    """What the beginning of an upload tells.

    Attributes:
        num_bytes: after which the tensors begin.
        starts: of each tensor, counted from there.
    """

    header: UploadHeader | StreamedHeader
    num_bytes: int
    starts: dict[str, int]


def read_head(beginning: bytes | bytearray) -> Head | None:
    """Reads the description from a file's first bytes.

    Args:
        beginning: as many bytes as have come so far.

    Returns:
        None while bytes are missing.

    Raises:
        CartridgeFormatError: not such a file, or its tensors are not those it describes.
    """
    if len(beginning) < 8:
        return None
    (length,) = struct.unpack("<Q", beginning[:8])
    if not 2 <= length <= MAX_HEADER_BYTES:
        hint = ""
        if beginning[:2] == b"PK" or beginning[:1] == b"\x80":
            hint = ". It looks like a .pt file: pickled files are never accepted, convert it"
        elif is_pointer(beginning) or beginning[:8] == b"version ":
            hint = f". {about('it')}"
        raise CartridgeFormatError(
            f"this is no safetensors file (a header of {length} bytes){hint}"
        )
    if len(beginning) < 8 + length:
        return None
    try:
        entries = loads(beginning[8 : 8 + length], MAX_PARTS)
    except BadJson as error:
        raise CartridgeFormatError(f"the safetensors header is not JSON: {error}") from error
    if not isinstance(entries, dict) or not isinstance(entries.get("__metadata__"), dict):
        raise CartridgeFormatError(
            "the safetensors file has no metadata; it must describe the version: "
            + ", ".join(UploadHeader.model_fields)
        )
    metadata = entries.pop("__metadata__")
    kind = StreamedHeader if metadata.get("format") == FORMATS[1] else UploadHeader
    try:
        header = kind.model_validate(metadata)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CartridgeFormatError(f"metadata {where[:80]}: {first['msg'][:400]}") from error
    if isinstance(header, StreamedHeader) and entries.pop(_DIGEST, None) != _digest_entry(header):
        raise CartridgeFormatError(
            f"{FORMATS[1]} ends with a tensor {_DIGEST} of {DIGEST_BYTES} U8, the hash of the "
            "others as they lie in the file; this file has none there"
        )
    return Head(header, 8 + length, _checked_starts(header, entries))


def _checked_starts(header: Description, entries: dict[str, Any]) -> dict[str, int]:
    """Names, shapes, types and places are those the metadata says, with no gap between them."""
    if header.num_frozen_tokens >= header.num_tokens:
        raise CartridgeFormatError(
            f"num_frozen_tokens={header.num_frozen_tokens} of num_tokens={header.num_tokens}: one "
            "trained token is the least"
        )
    if 4 * header.num_layers != len(entries):
        names = {name for name, _ in header.tensors()} if header.num_layers <= 4096 else set()
        strange = sorted(name[:60] for name in entries.keys() - names)[:4] if names else []
        more = f"; not known: {', '.join(strange)}" if strange else ""
        raise CartridgeFormatError(
            f"num_layers={header.num_layers} makes {4 * header.num_layers} tensors, the file has "
            f"{len(entries)}{more}"
        )
    dtype, places, starts = _SAFETENSORS_DTYPES[header.dtype], [], {}
    for name, shape in header.tensors():
        entry = entries.get(name)
        if not isinstance(entry, dict):
            raise CartridgeFormatError(f"tensor {name} is missing")
        if strange := sorted(key[:60] for key in entry.keys() - _OF_A_TENSOR):
            raise CartridgeFormatError(f"tensor {name}: unknown {', '.join(strange[:4])}")
        if entry.get("dtype") != dtype or entry.get("shape") != shape:
            raise CartridgeFormatError(
                f"tensor {name} is {entry.get('dtype')!s:.20} {entry.get('shape')!s:.60}; the "
                f"metadata says {dtype} {shape}"
            )
        offsets = entry.get("data_offsets")
        size = shape[1] * shape[2] * shape[3] * _BYTES[header.dtype]
        if (
            not isinstance(offsets, list)
            or [type(offset) for offset in offsets] != [int, int]
            or offsets[1] - offsets[0] != size
        ):
            raise CartridgeFormatError(f"tensor {name}: data_offsets {offsets!s:.60} are wrong")
        places.append(offsets)
        starts[name] = offsets[0]
    end = 0
    for start, stop in sorted(places):
        if start != end:
            raise CartridgeFormatError(f"the tensors leave a gap or overlap at byte {end}")
        end = stop
    return starts
