"""What the ways to the server add to a request: part (b) of `serving.py`."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.measure import verdict
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.distill.on_policy import ONLY_STEP
from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.protocol import CartridgeRef
from cartridge_distill.sync.http import HttpPublisher
from cartridge_distill.sync.versions import new_run_id, step_of, version_id
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.processes import say
from tests.gateway.rig import MODEL_NAME, Rig, child_environment
from tests.tiny import random_cartridge

_AIM_ADDED_MS = 2.0
_PROMPT_TOKENS = 64
_ROUNDS = 4  # of many requests in flight, per way

Call = Callable[[list[int]], Awaitable[object]]
"""Asks for one token after a prompt."""


@dataclass
class Way:
    """One way to the server, and what was measured of it."""

    name: str
    call: Call
    latencies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of a burst

    def quantile(self, share: float) -> float:
        """Milliseconds."""
        found = sorted(self.latencies)
        return 1000 * found[min(len(found) - 1, int(share * len(found)))]


def through(client: TokasaurusClient, version: str) -> Call:
    """Asked by this process' own client."""
    refs = [CartridgeRef(id=version, source="local")]

    async def call(prompt_ids: list[int]) -> object:
        return await client.complete(prompt_ids, 1, 1.0, refs)

    return call


@asynccontextmanager
async def through_ray(
    url: str, version: str, vocabulary: int, inflight: int
) -> AsyncIterator[tuple[Call, Call]]:
    """Asked as veRL's agent loop asks, with the proxy in charge of versions.

    Yields:
        That, and the call of the proxy itself, which is a Ray actor, for comparison.
    """
    import ray

    from verl_patches.rollout.tokasaurus_rollout.direct import DirectClient
    from verl_patches.rollout.tokasaurus_rollout.server import TokasaurusHttpServer

    options = {"num_cpus": 0, "max_concurrency": max(1000, 2 * inflight)}
    proxy: Any = ray.remote(TokasaurusHttpServer).options(**options).remote(url, 1, vocabulary)
    await proxy.expect.remote(version)
    await proxy.activate.remote(version)
    client = DirectClient(lambda: [proxy])
    sampling = {"temperature": 1.0, "max_tokens": 1, ONLY_STEP: step_of(version)}

    async def as_agent_loop(prompt_ids: list[int]) -> object:
        return await client.generate("b", prompt_ids=prompt_ids, sampling_params=sampling)

    async def through_proxy(prompt_ids: list[int]) -> object:
        return await proxy.generate.remote("b", prompt_ids=prompt_ids, sampling_params=sampling)

    yield as_agent_loop, through_proxy
    await client.close()


async def empty_ray_call(count: int) -> float:
    """Median milliseconds of a call of a Ray actor that does nothing: Ray's own share."""
    import ray

    class Empty:
        async def generate(self, prompt_ids: list[int]) -> list[int]:
            return prompt_ids

    actor: Any = ray.remote(Empty).options(num_cpus=0).remote()
    ids, seconds = list(range(_PROMPT_TOKENS)), []
    for _ in range(count):
        await asyncio.sleep(0.01)  # about as long as a server needs: nothing is kept awake
        start = time.perf_counter()
        await actor.generate.remote(ids)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def start_ray() -> None:
    """A small Ray of this machine alone.

    Raises:
        ConfigError: Ray or veRL is not installed.
    """
    os.environ.update(child_environment())
    os.environ.setdefault("VERL_PLATFORM", "cpu")
    try:
        import ray

        import verl_patches.rollout.tokasaurus_rollout.server  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{error}: the proxy needs Ray and veRL; install them or say --no-ray"
        ) from error
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="warning")


async def measure_ways(ways: list[Way], options: argparse.Namespace, vocabulary: int) -> None:
    """Every way in turn: one request at a time, then bursts."""
    draw = random.Random(0)

    def prompt() -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(_PROMPT_TOKENS)]

    for way in ways:
        for _ in range(10):
            await way.call(prompt())  # connections, caches
    told = time.monotonic()
    for number in range(options.requests):
        # Not always in one order: the one after another's answer finds the server just idle.
        for way in draw.sample(ways, len(ways)):
            ids = prompt()
            start = time.perf_counter()
            await way.call(ids)
            way.latencies.append(time.perf_counter() - start)
        if time.monotonic() - told > 5:
            told = time.monotonic()
            say(f"   ... one at a time: {number + 1}/{options.requests}")
    for number in range(1, _ROUNDS + 1):
        for way in draw.sample(ways, len(ways)):
            await _burst(way, [prompt() for _ in range(options.burst)], options.inflight)
        say(f"   ... {options.inflight} in flight: round {number}/{_ROUNDS}")


async def _burst(way: Way, prompts: list[list[int]], inflight: int) -> None:
    waiting = iter(prompts)

    async def work() -> None:
        for ids in waiting:
            await way.call(ids)

    start = time.perf_counter()
    await asyncio.gather(*[work() for _ in range(inflight)])
    way.seconds.append(time.perf_counter() - start)


async def request_table(options: argparse.Namespace, rig: Rig, model: PreTrainedModel) -> None:
    """Measures the ways to a gateway that serves ``model``, and prints what was found."""
    version = version_id(new_run_id("bench"), 0)
    snapshot = Snapshot.take(random_cartridge(model, 64).state_dict(), torch.float32)
    publisher = HttpPublisher([rig.url], MODEL_NAME)
    await asyncio.to_thread(publisher.publish, version, snapshot)
    server, vocabulary = rig.server_url(), model.config.vocab_size
    async with AsyncExitStack() as stack:
        direct = await stack.enter_async_context(TokasaurusClient(server))
        guarded = await stack.enter_async_context(TokasaurusClient(rig.url))
        ways = [
            Way("directly", through(direct, version)),
            Way("gateway", through(guarded, version)),
        ]
        if options.ray:
            made = through_ray(rig.url, version, vocabulary, options.inflight)
            loop, proxy = await stack.enter_async_context(made)
            ways += [Way("gateway, in a Ray call", proxy), Way("gateway, agent loop", loop)]
        await measure_ways(ways, options, vocabulary)
    say(
        f"\n(b) completions of one token after {_PROMPT_TOKENS}, behind a cartridge of "
        f"{snapshot.num_tokens}: {options.requests} one at a time, {_ROUNDS} x {options.burst} "
        f"with {options.inflight} in flight"
    )
    say(f"   {'':<22}{'median ms':>10}{'added':>8}{'p90 ms':>10}{'added':>8}{'requests/s':>12}")
    first = ways[0]
    for way in ways:
        median, high = way.quantile(0.5), way.quantile(0.9)
        added = (median - first.quantile(0.5), high - first.quantile(0.9))
        rate = options.burst / statistics.median(way.seconds)
        say(
            f"   {way.name:<22}{median:>10.2f}{added[0]:>+8.2f}{high:>10.2f}{added[1]:>+8.2f}"
            f"{rate:>12.0f}"
        )
    if options.ray:
        empty = await empty_ray_call(options.requests)
        say(f"   a call of a Ray actor that does nothing: {empty:.2f} ms, in the row that has one")
    said = verdict(added[0], _AIM_ADDED_MS, " ms")
    say(f"   added by {ways[-1].name}: {added[0]:.2f} ms   {said}")
