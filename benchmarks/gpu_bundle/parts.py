"""Parts: archives of files, and pieces of large files, small enough to travel with a call."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cartridge_distill.util.errors import ConfigError

MIB = 2**20
GROUP = 24 * MIB  # uncompressed bytes that one archive holds, about
PIECE = 16 * MIB  # of a file that is cut


@dataclass(frozen=True)
class Part:
    """One part, as parts.json describes it for install.py.

    Attributes:
        to: folder of the kit: project, site, overlay or files.
        kind: "archive", or "piece" of the file ``of`` from ``offset`` on.
        bytes: as delivered.
    """

    name: str
    to: str
    kind: str
    bytes: int
    sha256: str
    of: str = ""
    offset: int = 0
    of_sha256: str = ""


def _write(out: Path, name: str, raw: bytes) -> tuple[int, str]:
    """Compressed and the same for the same content; its size and SHA-256."""
    packed = gzip.compress(raw, 6, mtime=0)
    (out / name).write_bytes(packed)
    return len(packed), hashlib.sha256(packed).hexdigest()


def _groups(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Large files alone; the others by suffix and path, for what is alike compresses better."""
    group: list[Path] = []
    size = 0
    for file in sorted(files, key=lambda path: (path.suffix, str(path))):
        length = file.stat().st_size
        if length > GROUP // 2:
            yield [file]
            continue
        if group and size + length > GROUP:
            yield group
            group, size = [], 0
        group.append(file)
        size += length
    if group:
        yield group


def archives(root: Path, files: Sequence[Path], to: str, out: Path) -> list[Part]:
    """Archives of ``files``, all below ``root``, to be unpacked into the kit's folder ``to``."""
    found = []
    for number, group in enumerate(_groups(files)):
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for file in group:
                info = tar.gettarinfo(file, arcname=file.relative_to(root).as_posix())
                info.uid = info.gid = info.mtime = 0
                info.uname = info.gname = ""
                with file.open("rb") as stream:
                    tar.addfile(info, stream)
        name = f"{to}-{number:02d}.tar.gz"
        size, digest = _write(out, name, raw.getvalue())
        found.append(Part(name, to, "archive", size, digest))
    return found


def pieces(file: Path, out: Path) -> list[Part]:
    """One file for the kit's folder ``files``, cut."""
    whole = hashlib.sha256(file.read_bytes()).hexdigest()
    found = []
    with file.open("rb") as stream:
        while raw := stream.read(PIECE):
            offset = stream.tell() - len(raw)
            name = f"{file.name}.{offset // PIECE:02d}.gz"
            size, digest = _write(out, name, raw)
            part = Part(name, "files", "piece", size, digest, file.name, offset, whole)
            found.append(part)
    return found


def lay(parts: Sequence[Part], out: Path, most: int) -> list[Path]:
    """Moves the parts into deliveries ``call1``, ``call2``, ...: first fit, in the order given.

    Args:
        most: bytes of one delivery.

    Raises:
        ConfigError: one part is larger than that.
    """
    sizes: list[int] = []
    for part in parts:
        if part.bytes > most:
            raise ConfigError(
                f"{part.name} has {part.bytes / MIB:.1f} MiB, over the {most / MIB:.1f} MiB of a "
                "delivery; raise --most-mib, or leave its package out of carry.txt"
            )
        fits = (n for n, used in enumerate(sizes) if used + part.bytes <= most)
        call = next(fits, len(sizes))
        if call == len(sizes):
            sizes.append(0)
        sizes[call] += part.bytes
        folder = out / f"call{call + 1}"
        folder.mkdir(exist_ok=True)
        shutil.move(out / part.name, folder / part.name)
    folders = [out / f"call{number + 1}" for number in range(len(sizes))]
    for folder in folders:
        described = [asdict(part) for part in parts]
        (folder / "parts.json").write_text(json.dumps(described, indent=1))
    return folders
