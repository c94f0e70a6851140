"""Seconds from an optimizer step to the version that the server serves.

    python -m benchmarks.gpu_check.sync --shape llama-3.2-3b --device cuda --json sync.jsonl

The parts, each timed: AdamW on the float32 cartridge; the copy, for which the trainer is blocked;
writing the version into the shared directory; the embedded server's load, and a token with it, over
HTTP. Student and server share the device, as in the demo. The first round is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.arguments import require_at_least, require_multiple
from benchmarks.bases import add_base_options, check_base_options, make_base
from benchmarks.measure import synchronize
from cartridge_distill.cartridge.kv_shape import PAGE_TOKENS
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.protocol import CartridgeRef
from cartridge_distill.server.running import BackgroundServer
from cartridge_distill.server.settings import ServerSettings
from cartridge_distill.sync.shared_dir import SharedDirectoryPublisher
from cartridge_distill.sync.versions import new_run_id, version_id
from cartridge_distill.util.processes import say
from tests.tiny import byte_tokenizer

PARTS = ("optimizer", "copy", "write", "load and a token")


class Clock:
    """Seconds of the parts of each round."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rounds: list[dict[str, float]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.rounds[-1][name] = time.perf_counter() - start


async def token_with(url: str, version: str) -> None:
    """The server has the version when it has computed a token with it."""
    async with TokasaurusClient(url) as client:
        await client.complete([1], 1, 0.0, [CartridgeRef(id=version, source="local")])


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    model = make_base(options.model, options.shape, dtype, device)
    cartridge = TrainableCache.from_random(model.config, options.tokens).to(device)
    optimizer = torch.optim.AdamW(cartridge.trainable_parameters(), lr=0.02)
    publisher = SharedDirectoryPublisher(folder, "check")
    run, clock = new_run_id("check"), Clock(device)
    settings = ServerSettings(cartridge_dir=folder, model_name="check")
    with BackgroundServer(model, byte_tokenizer(), settings) as server:
        for number in range(options.repeats + 1):
            for parameter in cartridge.trainable_parameters():
                parameter.grad = torch.randn_like(parameter)
            clock.rounds.append({})
            version = version_id(run, number)
            with clock.part("optimizer"):
                optimizer.step()
            with clock.part("copy"):
                snapshot = Snapshot.take(cartridge.state_dict(), dtype)
            with clock.part("write"):
                publisher.publish(version, snapshot)
            with clock.part("load and a token"):
                asyncio.run(token_with(server.url, version))
            say(f"   {version}: {json.dumps(clock.rounds[-1])}")
    counted = clock.rounds[1:]
    parts = {name: statistics.median(found[name] for found in counted) for name in PARTS}
    whole = statistics.median(sum(found.values()) for found in counted)
    return {"megabytes": snapshot.num_bytes / 1e6, "seconds": whole, "parts": parts}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_base_options(parser)
    option = parser.add_argument
    option("--tokens", type=int, default=2048, help="of the cartridge (%(default)s)")
    option("--repeats", type=int, default=3, help="versions that count (%(default)s)")
    option("--json", type=Path, required=True, help="the figure goes to its end")
    options = parser.parse_args(arguments)
    check_base_options(parser, options)
    require_at_least(parser, options, repeats=1)
    require_multiple(parser, options, tokens=PAGE_TOKENS)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        figure = measure(options, Path(folder))
    with options.json.open("a") as file:
        file.write(json.dumps(figure) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
