"""The HTTP transport: a trainer's process and a server's process that share nothing but a port."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
import torch

from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.http import ClientSettings
from cartridge_distill.rollout.protocol import CartridgeRef
from cartridge_distill.sync.http import HttpPublisher
from cartridge_distill.sync.versions import new_run_id, version_id
from cartridge_distill.util.errors import SyncError
from tests.gateway.rig import MODEL_NAME, TOKEN, Rig, upload_bytes
from tests.tiny import plain_logprobs, random_cartridge, tiny_model

pytestmark = pytest.mark.integration
VERSIONS = 200
MODEL = tiny_model()
QUICK = ClientSettings(max_attempts=2, backoff_s=0.01, connect_timeout_s=2.0)


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKASAURUS_API_KEY", TOKEN)


def snapshot(seed: int, dtype: torch.dtype = torch.float32) -> Snapshot:
    return Snapshot.take(random_cartridge(MODEL, 16, seed).state_dict(), dtype)


def difference(seed: int, prompt: list[int], ids: list[int], logprobs: list[float]) -> float:
    """From what the cartridge of this seed gives, by one plain forward."""
    prefix = random_cartridge(MODEL, 16, seed).prefix()
    expected = plain_logprobs(MODEL, prefix, prompt, ids, 0.7)
    return float((torch.tensor(expected) - torch.tensor(logprobs)).abs().max())


async def test_200_versions_each_followed_by_a_rollout_that_only_it_can_have_made(
    rig: Rig,
) -> None:
    publisher = HttpPublisher([rig.url], MODEL_NAME)
    before, created = rig.on_disk(), rig.metric("uploads_total", "created")
    disk_bytes = rig.metric("disk_bytes")
    largest = 0
    async with TokasaurusClient(rig.url) as client:
        for step in range(VERSIONS):
            version = version_id("many", step)
            # in a thread, as the trainer does it
            await asyncio.to_thread(publisher.publish, version, snapshot(step))
            prompt = [40 + step % 50, 7, 9]
            [done] = await client.complete(
                prompt, 6, 0.7, [CartridgeRef(id=version, source="local")]
            )
            assert difference(step, prompt, done.token_ids, done.logprobs) < 1e-4
            if step:
                assert difference(step - 1, prompt, done.token_ids, done.logprobs) > 1e-3
            largest = max(largest, len(rig.on_disk()))
            if step % 10 == 9:
                await asyncio.to_thread(publisher.retire, 2)
    assert largest - len(before) <= 4  # three kept (--keep-versions), and the new one
    assert rig.metric("uploads_total", "created") - created == VERSIONS
    assert rig.metric("versions") - len(before) <= 3
    assert rig.metric("disk_bytes") - disk_bytes <= 3 * snapshot(0).num_bytes


def test_bfloat16_arrives_as_bfloat16(rig: Rig) -> None:
    version = version_id("half", 0)
    HttpPublisher([rig.url], MODEL_NAME).publish(version, snapshot(0, torch.bfloat16))
    info = rig.http.get(f"/cartridges/{version}").json()
    assert info["header"]["dtype"] == "bfloat16"
    assert info["num_bytes"] == 16 * 2 * 2 * 2 * 16 * 2  # tokens, k/v, layers, heads, size, bytes
    assert rig.complete(version).status_code == 200


def test_old_versions_are_retired(rig: Rig) -> None:
    publisher = HttpPublisher([rig.url], MODEL_NAME, QUICK)
    for step in range(4):  # the gateway itself keeps three: the first is gone already
        publisher.publish(version_id("old", step), snapshot(step))
    assert publisher.retire(2) == [version_id("old", 0), version_id("old", 1)]
    kept = [name for name in rig.on_disk() if name.startswith("old")]
    assert kept == [version_id("old", 2), version_id("old", 3)]
    assert publisher.retire(2) == []


def test_what_earlier_starts_left_goes_and_nothing_else(rig: Rig) -> None:
    before = rig.on_disk()
    dead, other = new_run_id("mine"), new_run_id("mine")
    publisher = HttpPublisher([rig.url], MODEL_NAME, QUICK)
    for run, step in ((dead, 3), (dead, 4), (other, 4)):
        publisher.publish(version_id(run, step), snapshot(step))
    assert rig.put("mine-by-hand", upload_bytes()).status_code == 201
    again = HttpPublisher([rig.url], MODEL_NAME, QUICK)
    assert again.delete_runs([dead]) == [version_id(dead, 3), version_id(dead, 4)]
    assert rig.on_disk() == sorted([*before, "mine-by-hand", version_id(other, 4)])
    assert again.delete_runs([dead]) == again.delete_runs([]) == []


def test_refusals_reach_the_trainer_in_the_gateways_words(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SyncError, match="base_model='other', this server has 'tiny'"):
        HttpPublisher([rig.url], "other", QUICK).publish(version_id("run", 0), snapshot(0))
    monkeypatch.setenv("TOKASAURUS_API_KEY", "a-wrong-token-of-length")
    with caplog.at_level(logging.DEBUG), pytest.raises(SyncError, match="set TOKASAURUS_API_KEY"):
        HttpPublisher([rig.url], MODEL_NAME, QUICK).publish(version_id("run", 0), snapshot(0))
    assert "a-wrong-token" not in caplog.text + rig.log


def test_the_disk_bound_holds_and_all_servers_or_none(start_rig: Any, rig: Rig) -> None:
    size = snapshot(0).num_bytes
    small = start_rig("--max-disk-gb", 3.5 * size / 1e9, "--keep-versions", 50)
    # a version is published when every server has it
    publisher = HttpPublisher([rig.url, small.url, rig.url + "/"], MODEL_NAME, QUICK)
    assert publisher.urls == [rig.url, small.url]
    publisher.publish(version_id("both", 0), snapshot(0))
    assert rig.complete(version_id("both", 0)).is_success
    assert small.complete(version_id("both", 0)).is_success
    publisher = HttpPublisher([small.url], MODEL_NAME, QUICK)
    # versions of a run make room for newer ones, the oldest first ...
    for step in range(6):
        publisher.publish(version_id("run", step), snapshot(step))
    assert len(small.on_disk()) <= 3 and version_id("run", 5) in small.on_disk()
    # ... what was put there by hand does not; refused when it is announced
    assert small.put("one", upload_bytes(seed=9)).status_code == 201
    before = small.on_disk()
    answer = small.put("two", upload_bytes(seed=9))
    assert answer.status_code == 507
    assert "max_disk_gb" in answer.json()["detail"] and "do not fit" in answer.json()["detail"]
    assert small.on_disk() == before
    assert sum(f.stat().st_size for f in small.cartridges.rglob("*")) < 8 * size
    small.stop()
    both = HttpPublisher([rig.url, small.url], MODEL_NAME, QUICK)
    with pytest.raises(SyncError, match=f"was not published: .*{small.url}"):
        both.publish(version_id("both", 1), snapshot(1))
