"""What the tests of veRL's HTTP proxy give it: patience, sampling, and versions in turn."""

from __future__ import annotations

from typing import Any

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
