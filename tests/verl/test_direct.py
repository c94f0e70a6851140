"""The agent loop asks the servers itself; what it knows of versions comes from the proxies."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl.workers.rollout.replica", reason="veRL is not installed")

from cartridge_distill.sync.versions import version_id
from cartridge_distill.util.errors import ConfigError, RolloutError, SyncError
from tests.tiny import random_cartridge, tiny_model, write_cartridge
from tests.verl.proxy_rig import SAMPLING, serving_versions, sync
from verl_patches.rollout.tokasaurus_rollout.direct import DirectClient
from verl_patches.rollout.tokasaurus_rollout.server import TokasaurusHttpServer


class Handle:
    """A proxy as Ray's handle of it is called; counts the questions."""

    def __init__(self, proxy: TokasaurusHttpServer) -> None:
        self.proxy = proxy
        self.asked: list[int | None] = []
        self.settings = self._call(proxy.settings)
        self.version_for = self._call(self._noted)

    async def _noted(self, oldest: int | None) -> str:
        self.asked.append(oldest)
        return await self.proxy.version_for(oldest)

    @staticmethod
    def _call(method: Any) -> Any:
        class Remote:
            remote = staticmethod(method)

        return Remote()


@pytest.fixture
async def handle(start_server: Any, tmp_path: Path) -> Any:
    async with serving_versions(start_server, tmp_path, 3) as proxy:
        yield Handle(proxy)


@pytest.fixture
async def client(handle: Handle) -> Any:
    made = DirectClient(lambda: [handle])
    yield made
    await made.close()


async def rollout(client: DirectClient, **params: Any) -> Any:
    sampling = {**SAMPLING, "seed": 3, **params}
    return await client.generate("r", prompt_ids=[10, 20, 30], sampling_params=sampling)


async def test_the_answer_is_the_proxys_and_the_version_is_asked_for_once_a_step(
    client: DirectClient, handle: Handle
) -> None:
    for step in range(2):
        await sync(handle.proxy, version_id("run", step))
        found = await asyncio.gather(*[rollout(client, only_step=step) for _ in range(8)])
        found.append(await rollout(client, only_step=step))
        by_proxy = await handle.proxy.generate(
            "r", prompt_ids=[10, 20, 30], sampling_params={**SAMPLING, "seed": 3}
        )
        for output in found:
            assert output.token_ids == by_proxy.token_ids
            assert output.log_probs == pytest.approx(by_proxy.log_probs, abs=1e-5)
            assert output.extra_fields == {
                **by_proxy.extra_fields,
                "min_global_steps": step,
                "max_global_steps": step,
            }
            assert output.extra_fields["cartridge_version"] == version_id("run", step)
    assert handle.asked == [None, None]


async def test_a_version_that_is_known_is_not_used_for_another_step(
    client: DirectClient, handle: Handle
) -> None:
    await sync(handle.proxy, version_id("run", 0))
    await rollout(client, only_step=0)
    await handle.proxy.expect(version_id("run", 1))
    late = asyncio.create_task(rollout(client, only_step=1))
    done, _ = await asyncio.wait({late}, timeout=0.3)
    assert not done  # version 0 would answer, and must not
    await handle.proxy.activate(version_id("run", 1))
    assert (await late).extra_fields["global_steps"] == 1
    await handle.proxy.expect(version_id("run", 2))
    waiting = [asyncio.create_task(rollout(client, only_step=2)) for _ in range(3)]
    await asyncio.sleep(0.1)
    await handle.proxy.give_up(version_id("run", 2), "the disk is full")
    for found in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(found, SyncError) and "the disk is full" in str(found)
    with pytest.raises(SyncError, match="the disk is full"):  # nor is the old one, later
        await rollout(client, only_step=2)


async def test_a_rollout_that_is_asked_for_ahead_has_the_newest_version_that_is_there(
    client: DirectClient, handle: Handle
) -> None:
    await sync(handle.proxy, version_id("run", 0))
    found = await asyncio.gather(*[rollout(client, oldest_step=0) for _ in range(8)])
    assert {output.extra_fields["global_steps"] for output in found} == {0}
    assert handle.asked == [0]  # one question for all that came at once
    await sync(handle.proxy, version_id("run", 1))
    assert (await rollout(client, oldest_step=0)).extra_fields["global_steps"] == 1
    await handle.proxy.expect(version_id("run", 2))
    assert (await rollout(client, oldest_step=1)).extra_fields["global_steps"] == 1
    late = asyncio.create_task(rollout(client, oldest_step=2))
    done, _ = await asyncio.wait({late}, timeout=0.3)
    assert not done
    await handle.proxy.activate(version_id("run", 2))
    assert (await late).extra_fields["global_steps"] == 2


async def test_a_rollout_that_names_no_step_asks_each_time(
    client: DirectClient, handle: Handle
) -> None:
    with pytest.raises(SyncError, match="no cartridge version was synced yet"):
        await rollout(client)
    for step in range(2):
        await sync(handle.proxy, version_id("run", step))
        assert (await rollout(client)).extra_fields["global_steps"] == step
    assert handle.asked == [None] * 3


async def test_who_gives_up_takes_the_version_from_nobody_else(
    client: DirectClient, handle: Handle
) -> None:
    await handle.proxy.expect(version_id("run", 0))
    first, second = (asyncio.create_task(rollout(client, only_step=0)) for _ in range(2))
    await asyncio.sleep(0.1)
    first.cancel()
    await asyncio.wait({first})
    assert first.cancelled()
    await handle.proxy.activate(version_id("run", 0))
    assert (await second).extra_fields["global_steps"] == 0
    assert handle.asked == [None]
    assert [server.in_flight for server in await client._all()] == [0]


async def test_the_teacher_needs_no_version(client: DirectClient, handle: Handle) -> None:
    output = await rollout(client, author="teacher")
    assert output.extra_fields["author"] == "teacher"
    assert "cartridge_version" not in output.extra_fields
    assert output.extra_fields["max_global_steps"] is None
    assert handle.asked == []


async def test_what_the_proxy_refuses_is_refused(client: DirectClient, handle: Handle) -> None:
    await sync(handle.proxy, version_id("run", 0))
    with pytest.raises(ConfigError, match=r"top_p=0.9"):
        await rollout(client, only_step=0, top_p=0.9)
    await sync(handle.proxy, version_id("run", 1))
    with pytest.raises(RolloutError, match="HTTP 400"):
        await rollout(client, only_step=1, max_tokens=10**6)


async def test_several_servers_share_the_rollouts(start_server: Any, tmp_path: Path) -> None:
    write_cartridge(random_cartridge(tiny_model(), 16), tmp_path, version_id("run", 0))
    servers = [start_server() for _ in range(2)]
    handles = [Handle(TokasaurusHttpServer(server.url, 6, 259)) for server in servers]
    for handle in handles:
        await sync(handle.proxy, version_id("run", 0))
    client = DirectClient(lambda: handles)
    await asyncio.gather(*[rollout(client, only_step=0) for _ in range(8)])
    assert [handle.asked for handle in handles] == [[None], [None]]
    # One of the sync's own.
    assert [server.service.engine.stats.new_tokens > 6 for server in servers] == [True, True]
    await client.close()
    for handle in handles:
        await handle.proxy.close()
