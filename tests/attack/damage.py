"""What can happen to a file: a bit, its end, and changes that know what kind of file it is."""

from __future__ import annotations

import io
import itertools
import json
import random
import struct
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import yaml

_DIRECTORY_ENTRY = b"PK\x01\x02"
_OFFSET_OF_ENTRY = 42  # of a record's place, in its entry of a zip's directory


@dataclass(frozen=True)
class Damage:
    """One changed file: what was done, and of which kind that is."""

    kind: str
    what: str
    data: bytes


def damages(data: bytes, count: int | None = None, seed: int = 0) -> Iterator[Damage]:
    """Every bit changed, and every beginning.

    Args:
        count: so many of them, drawn with the seed; None for all.
    """
    numbers: Iterable[int] = range(9 * len(data))
    if count is not None and count < 9 * len(data):
        numbers = random.Random(seed).sample(range(9 * len(data)), count)
    for number in numbers:
        place, bit = divmod(number, 9)
        if bit == 8:
            yield Damage("cut", f"the first {place} bytes", data[:place])
            continue
        changed = bytearray(data)
        changed[place] ^= 1 << bit
        yield Damage("bit", f"bit {bit} of byte {place}", bytes(changed))


def structural(file: str, data: bytes) -> Iterator[Damage]:
    """Keys that nobody knows, places that are exchanged, and what else the kind of file allows."""
    suffix = file.rpartition(".")[2]
    if suffix == "safetensors":
        yield from _of_safetensors(data)
    elif suffix == "pt":
        yield from _of_zip(data)
    elif suffix == "json":
        yield from _of_json(data)
    elif suffix == "jsonl":
        yield from _of_lines(data)
    elif suffix == "yaml":
        yield from _of_yaml(data)
    for name, text in (
        *(("nothing", b""), ("zeros", bytes(len(data))), ("doubled", data + data)),
        *(("deep lists", b"[" * 100_000), ("a long number", b"9" * 100_000), ("no text", b"\xff")),
    ):
        if not (name == "doubled" and suffix == "jsonl"):  # which is twice as much of the same
            yield Damage("whole", name, text)


def _of_safetensors(data: bytes) -> Iterator[Damage]:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])

    def written(changed: dict[str, Any]) -> bytes:
        text = json.dumps(changed, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    names = [name for name in header if name != "__metadata__"]
    for one, other in itertools.combinations(names, 2):
        first, second = header[one], header[other]
        if first["shape"] == second["shape"] and first["dtype"] == second["dtype"]:
            exchanged = {
                one: {**first, "data_offsets": second["data_offsets"]},
                other: {**second, "data_offsets": first["data_offsets"]},
            }
            yield Damage("exchanged", f"{one} and {other}", written(header | exchanged))
    surprise = {"surprise": "1"}
    metadata = header.get("__metadata__", {}) | surprise
    yield Damage("unknown", "metadata", written(header | {"__metadata__": metadata}))
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    yield Damage("unknown", "a tensor", written({"surprise": empty, **header}))


def _of_zip(data: bytes) -> Iterator[Damage]:
    places = []
    start = data.find(_DIRECTORY_ENTRY)
    while start >= 0:
        places.append(start + _OFFSET_OF_ENTRY)
        start = data.find(_DIRECTORY_ENTRY, start + 4)
    for one, other in itertools.combinations(places, 2):
        changed = bytearray(data)
        changed[one : one + 4], changed[other : other + 4] = (
            data[other : other + 4],
            data[one : one + 4],
        )
        yield Damage("exchanged", f"records at {one} and {other}", bytes(changed))
    content = torch.load(io.BytesIO(data), weights_only=True)
    content["surprise"] = [torch.zeros(1, 1, 1, 4)]
    file = io.BytesIO()
    torch.save(content, file)
    if "loader" not in content:  # the others are not ours to know
        yield Damage("unknown", "a key", file.getvalue())
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
            for record in source.infolist():
                target.writestr(record.filename, source.read(record))
        yield Damage("whole", "compressed", packed.getvalue())


def _of_json(data: bytes) -> Iterator[Damage]:
    content = json.loads(data)
    yield Damage("unknown", "at the top", json.dumps(content | {"surprise": 1}).encode())
    for name, inner in content.items():
        if isinstance(inner, dict):
            changed = content | {name: inner | {"surprise": 1}}
            if name != "metrics" or "entries_sha256" in content:
                yield Damage("unknown", f"in {name}", json.dumps(changed).encode())
        for wrong in (None, -1, 1.5, "x", [], {}, True, float("nan")):
            text = json.dumps(content | {name: wrong}).encode()
            if json.loads(data) != json.loads(text) and name != "peft_type":
                yield Damage("value", f"{name}={wrong}", text)
        less = {other: value for other, value in content.items() if other != name}
        if name not in ("entries_sha256", "tensors_sha256"):
            yield Damage("missing", name, json.dumps(less).encode())
        twice = data.replace(b"{", b'{"%b": 0,' % name.encode(), 1)
        yield Damage("twice", name, twice)


def _of_lines(data: bytes) -> Iterator[Damage]:
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines):
        content = json.loads(line)
        if "entries_sha256" in content:
            changed = json.dumps(content | {"surprise": 1}).encode() + b"\n"
            yield Damage(
                "unknown",
                f"in line {number}",
                b"".join([*lines[:number], changed, *lines[number + 1 :]]),
            )


def _of_yaml(data: bytes) -> Iterator[Damage]:
    content = yaml.safe_load(data)
    yield Damage("unknown", "at the top", yaml.safe_dump(content | {"surprise": 1}).encode())
    for text in (b"a: &a [*a]", b"2020-01-01", b"? [x]\n: 1", b"!!python/object:os.system x"):
        yield Damage("value", text.decode(), text)
