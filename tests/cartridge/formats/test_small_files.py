"""A small file does not become gigabytes: with every way in which a ``.pt`` can say it is large.

Each is read in a process of its own whose memory is limited, so that a reader which believes the
file fails the test and not the machine.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cartridge_distill.cartridge.checkpoint import load_cartridge, load_pt_prefix, write_cartridge
from cartridge_distill.cartridge.snapshot import PARTS
from cartridge_distill.util.errors import CartridgeFormatError
from tests.cartridge.formats.made import stored

TOKENS = 100_000
# What is read, and how much address space may be added for it: the files claim gigabytes.
_READ = """
import resource, sys
from pathlib import Path
from cartridge_distill.cartridge.formats.detect import read_local
from cartridge_distill.cartridge.checkpoint import load_pt_prefix
from cartridge_distill.util.errors import CartridgeFormatError

now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**29, now + 2**29))
path = Path(sys.argv[1])
for read in (read_local, load_pt_prefix) if path.suffix == ".pt" else (read_local,):
    try:
        read(path)
    except CartridgeFormatError as error:
        print("refused:", error)
"""


def repeated(*strides: int) -> Tensor:
    return torch.ones(64).as_strided((1, 8, TOKENS, 64), (*strides, 1))


def save(path: Path, tensors: list[Any]) -> Path:
    torch.save({name: tensors for name in PARTS}, path)
    return path


def compressed(path: Path, target: Path) -> Path:
    """The same file as another tool would zip it."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as out:
        for record in source.infolist():
            out.writestr(record.filename, source.read(record))
    path.unlink()
    return target


def relabelled(path: Path, **fields: int) -> Path:
    """The same file whose directory says something else of its largest record."""
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
        for name, value in fields.items():
            setattr(largest, name, value)
        archive._didModify = True  # so that the directory is written anew
    return path


def hostile(kind: str, folder: Path) -> Path:
    path = folder / "a.pt"
    if kind == "stride 0":
        return save(path, [repeated(0, 0, 0)])
    if kind == "stride 1":
        return save(path, [torch.ones(TOKENS + 72).as_strided((1, 8, TOKENS, 64), (0, 1, 1, 1))])
    if kind == "a parameter":
        return save(path, [nn.Parameter(repeated(0, 0, 0))])
    if kind == "layers of one storage":
        return save(path, [torch.ones(1, 8, 1000, 64)] * 1000)
    if kind == "compressed":
        save(path, [torch.zeros(1, 8, TOKENS, 64)])
        return compressed(path, folder / "b.pt")
    if kind == "sparse":
        return save(path, [torch.sparse_coo_tensor(torch.zeros(4, 0), [], (1, 8, TOKENS, 64))])
    if kind == "a folder":  # torch leaves its numbers unread: they are what lay in memory
        return relabelled(save(path, [torch.ones(1, 8, 64, 64)]), external_attr=0x10)
    if kind == "nothing stored":
        fields = {"compress_size": 0, "CRC": 0}
        return relabelled(save(path, [torch.ones(1, 8, 64, 64)]), **fields)
    assert kind == "tokasaurus"
    write_cartridge(stored(), folder / "c", "tokasaurus")
    save(folder / "c" / "cartridge.pt", [repeated(0, 0, 0)])
    return folder / "c"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("stride 0", "are stored of it"),
        ("stride 1", "are stored of it"),
        ("a parameter", "are stored of it"),
        ("layers of one storage", "share what is stored"),
        ("compressed", "is compressed"),
        ("a folder", "says that it is a folder"),
        ("nothing stored", "0 of its"),
        ("sparse", "is no plain tensor|cannot be read safely"),
        ("tokasaurus", "are stored of it"),
    ],
)
def test_it_is_refused_before_it_is_copied(kind: str, says: str, tmp_path: Path) -> None:
    path = hostile(kind, tmp_path)
    asked = [sys.executable, "-c", _READ, str(path)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == (2 if path.suffix == ".pt" else 1)
    for line in lines:
        assert line.startswith("refused:") and str(tmp_path) in line
        assert any(part in line for part in says.split("|")), line


@pytest.mark.parametrize("kind", ["meta", "nested", "sparse"])
def test_tensors_without_numbers_are_refused_in_words(kind: str, tmp_path: Path) -> None:
    odd = {
        "meta": lambda: torch.empty(1, 2, 16, 16, device="meta"),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 16, 16)]),
        "sparse": lambda: torch.ones(1, 2, 16, 16).to_sparse(),
    }[kind]()
    path = save(tmp_path / "a.pt", [odd])
    for read in (load_cartridge, load_pt_prefix):
        with pytest.raises(CartridgeFormatError, match=r"a\.pt"):
            read(path)


def test_views_of_one_storage_are_an_ordinary_cartridge(tmp_path: Path) -> None:
    """As a cartridge is saved whose frozen part was sliced off and not copied."""
    whole = torch.randn(1, 2, 32, 16)
    parts = {"frozen": whole[:, :, :1], "trainable": whole[:, :, 1:]}
    data = {f"{part}_{kind}": [t] for part, t in parts.items() for kind in ("keys", "values")}
    torch.save(data, tmp_path / "a.pt")
    assert torch.equal(load_cartridge(tmp_path / "a.pt").prefix().keys[0], whole)
