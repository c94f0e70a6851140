"""What the tests of veRL's HTTP proxy give it: patience, sampling, and versions in turn."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cartridge_distill.sync.versions import version_id
from tests.tiny import random_cartridge, tiny_model, write_cartridge

PATIENCE = {
    "max_attempts": 2,
    "backoff_s": 0.01,
    "startup_timeout_s": 1.0,
    "connect_timeout_s": 1.0,
}
SAMPLING = {
    "temperature": 0.7,
    "top_p": 1.0,
    "top_k": -1,
    "repetition_penalty": 1.0,
    "logprobs": True,
}


async def sync(proxy: Any, version: str) -> None:
    """What the adapter does with each version."""
    await proxy.expect(version)
    await proxy.activate(version)


@asynccontextmanager
async def serving_versions(start_server: Any, folder: Path, count: int) -> AsyncIterator[Any]:
    """A proxy before a server with so many versions of one run, closed at the end."""
    from verl_patches.rollout.tokasaurus_rollout.server import TokasaurusHttpServer  # needs veRL

    for step in range(count):
        cartridge = random_cartridge(tiny_model(), 16, seed=step)
        write_cartridge(cartridge, folder, version_id("run", step))
    made = TokasaurusHttpServer(start_server().url, 6, vocab_size=259, client_options=PATIENCE)
    yield made
    await made.close()
