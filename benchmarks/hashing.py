"""What the hashes of a cartridge cost: seconds to save it, to load it, and to check it at start.

    python benchmarks/hashing.py
    python benchmarks/hashing.py --tokens 8192 --dtype float32

A cartridge of Llama-3.2-3B's shape with random numbers is saved in the native format and read
again, and laid down as the gateway keeps a version, which the gateway checks when it starts. Beside
each stand the seconds of SHA-256 in it. Files are in the system's cache when they are read.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.arguments import require_at_least  # noqa: E402
from benchmarks.bases import LLAMA_3B, SHAPES, machine  # noqa: E402
from cartridge_distill.cartridge.content_hash import sha256_of  # noqa: E402
from cartridge_distill.cartridge.formats import native, tokasaurus  # noqa: E402
from cartridge_distill.cartridge.formats.stored_cartridge import (  # noqa: E402
    CartridgeMeta,
    StoredCartridge,
)
from cartridge_distill.cartridge.snapshot import PARTS, Snapshot  # noqa: E402
from cartridge_distill.gateway.verifying import check_files  # noqa: E402
from cartridge_distill.sync.upload import UploadHeader  # noqa: E402
from cartridge_distill.util.processes import say  # noqa: E402

_MODEL = "random"


def random_cartridge(shape: str, tokens: int, dtype: torch.dtype) -> StoredCartridge:
    """One frozen token, and random numbers in the rest."""
    sizes = SHAPES[shape]
    heads, head_dim = sizes["num_key_value_heads"], sizes["head_dim"]
    parts = {
        part: [
            torch.randn(1, heads, 1 if part.startswith("frozen") else tokens - 1, head_dim).to(
                dtype
            )
            for _ in range(sizes["num_hidden_layers"])
        ]
        for part in PARTS
    }
    return StoredCartridge(Snapshot(parts), CartridgeMeta(_MODEL))


def upload_header(cartridge: StoredCartridge, sha256: str) -> UploadHeader:
    """What the gateway keeps of such a version."""
    about = {**cartridge.shape(), "dtype": cartridge.dtype_name()}
    return UploadHeader.model_validate({"base_model": _MODEL, "step": 0, "sha256": sha256, **about})


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median."""
    found = []
    for _ in range(repeats):
        started = time.monotonic()
        work()
        found.append(time.monotonic() - started)
    return statistics.median(found)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--shape", choices=sorted(SHAPES), default=LLAMA_3B, help="(%(default)s)")
    option("--tokens", type=int, default=2048, help="of the cartridge (%(default)s)")
    option("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="(%(default)s)")
    option("--repeats", type=int, default=5, help="of which the median is printed (%(default)s)")
    option("--folder", type=Path, help="on the disk to measure (the system's temporary one)")
    options = parser.parse_args(arguments)
    require_at_least(parser, options, tokens=2, repeats=1)
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(arguments)
    say(f"machine: {machine('cpu')}; torch {torch.__version__}")
    cartridge = random_cartridge(options.shape, options.tokens, getattr(torch, options.dtype))
    tensors = [tensor for _, tensor in cartridge.snapshot.items()]
    megabytes = sum(tensor.nbytes for tensor in tensors) / 1e6
    say(f"{options.shape}, {options.tokens} tokens, {options.dtype}: {megabytes:.0f} MB")
    header = upload_header(cartridge, sha256_of(tensors))
    work = Path(tempfile.mkdtemp(prefix="hashing-", dir=options.folder))
    try:
        ours, served = work / "native", work / "served"
        jobs: dict[str, Callable[[], object]] = {
            "SHA-256 alone": lambda: sha256_of(tensors),
            "save (hashed, written and flushed)": lambda: native.write(
                cartridge, ours, overwrite=True
            ),
            "load (read and hashed)": lambda: native.read(ours),
            "the gateway's check of a version at its start": lambda: check_files(served, header),
        }
        tokasaurus.write_snapshot(cartridge.snapshot, served, _MODEL)
        for name, job in jobs.items():
            say(f"{seconds(job, options.repeats):8.3f} s  {name}")
    finally:
        shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
