"""The HTTP proxy and the agent loop against real embedded servers, without Ray."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("verl.workers.rollout.replica", reason="veRL is not installed")

from cartridge_distill.model.prompts import render_prompt
from cartridge_distill.sync.versions import version_id
from cartridge_distill.util.errors import ConfigError, RolloutError, ServerUnreachable, SyncError
from tests.tiny import (
    byte_tokenizer,
    plain_logprobs,
    random_cartridge,
    tiny_model,
    write_cartridge,
)
from tests.two_servers import Answer, Asked, serving
from tests.verl.proxy_rig import PATIENCE, SAMPLING, serving_versions, sync
from verl_patches.rollout.tokasaurus_rollout.replica import server_urls
from verl_patches.rollout.tokasaurus_rollout.server import TokasaurusHttpServer


@pytest.fixture
async def proxy(start_server: Any, tmp_path: Path) -> Any:
    async with serving_versions(start_server, tmp_path, 2) as made:
        yield made


async def test_each_answer_is_labelled_with_the_version_that_made_it(proxy: Any) -> None:
    assert await proxy.wait_until_ready()
    prompt = [10, 20, 30]
    for step in range(2):
        await sync(proxy, version_id("run", step))
        out = await proxy.generate("r", prompt_ids=prompt, sampling_params=SAMPLING)
        assert out.extra_fields["global_steps"] == step
        assert out.extra_fields["cartridge_version"] == version_id("run", step)
        # and it was that version: log-probs of the other cartridge are elsewhere
        for other in range(2):
            prefix = random_cartridge(tiny_model(), 16, seed=other).prefix()
            expected = plain_logprobs(tiny_model(), prefix, prompt, out.token_ids, 0.7)
            difference = (torch.tensor(expected) - torch.tensor(out.log_probs)).abs().max()
            assert (difference < 1e-5) == (other == step)
    assert await proxy.versions_served() == [version_id("run", 0), version_id("run", 1)]


async def test_what_the_student_asks_is_what_it_always_asked(
    proxy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At on_policy_fraction=1 nothing changes on the wire."""
    await sync(proxy, version_id("run", 0))
    sent: list[dict[str, Any]] = []
    post = proxy.client._http.json

    async def noted(method: str, path: str, body: dict[str, Any]) -> Any:
        sent.append(body)
        return await post(method, path, body)

    monkeypatch.setattr(proxy.client._http, "json", noted)
    await proxy.generate("r", prompt_ids=[5, 6], sampling_params=SAMPLING)
    reference = {"id": version_id("run", 0), "source": "local"}
    assert sent == [
        {
            "model": "default",
            "prompt": [5, 6],
            "max_tokens": 6,
            "temperature": 0.7,
            "n": 1,
            "cartridges": [reference],
            "logprobs_in_fingerprint": True,
        }
    ]


async def test_a_version_the_server_cannot_load_fails_the_sync(proxy: Any) -> None:
    with pytest.raises(SyncError, match="does not serve cartridge version run-step-000009"):
        await sync(proxy, version_id("run", 9))


async def test_no_rollout_is_made_by_the_bare_model(proxy: Any) -> None:
    with pytest.raises(SyncError, match="no cartridge version was synced yet"):
        await proxy.generate("r", prompt_ids=[5], sampling_params=SAMPLING)


async def test_a_version_is_never_returned_to(proxy: Any) -> None:
    await sync(proxy, version_id("run", 0))
    await sync(proxy, version_id("run", 1))
    with pytest.raises(SyncError, match="never loads an id twice"):
        await sync(proxy, version_id("run", 0))


async def test_a_prompt_over_the_servers_limit_is_an_error(
    start_server: Any, tmp_path: Path
) -> None:
    write_cartridge(random_cartridge(tiny_model(), 16), tmp_path, version_id("run", 0))
    url = start_server(max_tokens_per_request=20).url
    proxy = TokasaurusHttpServer(url, 6, client_options=PATIENCE)
    await sync(proxy, version_id("run", 0))
    with pytest.raises(RolloutError, match="400"):
        await proxy.generate("r", prompt_ids=[5] * 18, sampling_params=SAMPLING)
    await proxy.close()


@pytest.mark.parametrize("change", [{"top_p": 0.9}, {"top_k": 40}, {"repetition_penalty": 1.1}])
async def test_sampling_that_tokasaurus_has_not_is_refused(
    proxy: Any, change: dict[str, float]
) -> None:
    await sync(proxy, version_id("run", 0))
    with pytest.raises(ConfigError, match=next(iter(change))):
        await proxy.generate("r", prompt_ids=[5], sampling_params={**SAMPLING, **change})


async def test_a_server_that_is_down_at_the_start_is_named() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    proxy = TokasaurusHttpServer(url, 6, client_options=PATIENCE)
    with pytest.raises(ServerUnreachable, match=url):
        await proxy.wait_until_ready()
    await proxy.close()


@pytest.mark.parametrize("status", ["failure", "finished"])
def test_a_prompt_that_failed_for_good_is_never_padded_over(
    status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """veRL's own buffer would repeat other samples in its place."""
    import transfer_queue as tq

    from verl_patches.trainer.replay import StrictReplayBuffer

    tags = {
        "a": {"is_prompt": True, "status": "finished", "global_steps": 1},
        "b": {"is_prompt": True, "status": status, "global_steps": 1},
        "b_0_0": {"seq_len": 3},
        "a_0_0": {"seq_len": 2},
    }
    monkeypatch.setattr(tq, "kv_list", lambda *_: {"train": tags})
    monkeypatch.setattr(tq, "kv_clear", lambda keys, partition_id: None)
    buffer = StrictReplayBuffer("sync", {}, 1, "drop", {}, poll_interval=0.0)  # type: ignore[arg-type]
    if status == "failure":
        with pytest.raises(RolloutError, match="1 train prompts failed for good"):
            buffer.sample(global_steps=1, partition_id="train", batch_size=2)
    else:
        batch, _ = buffer.sample(global_steps=1, partition_id="train", batch_size=2)
        assert batch.keys == ["a_0_0", "b_0_0"]  # in order, so that runs repeat


def test_urls_of_one_or_several_servers() -> None:
    assert server_urls({"tokasaurus_url": "http://a:1/"}) == ["http://a:1"]
    assert server_urls({"tokasaurus_url": ["http://a:1", "http://b:1"]}) == [
        "http://a:1",
        "http://b:1",
    ]
    with pytest.raises(ConfigError, match="tokasaurus_url is not set"):
        server_urls({})


async def test_a_rollout_waits_for_the_version_that_is_on_its_way(proxy: Any) -> None:
    await sync(proxy, version_id("run", 0))
    await proxy.expect(version_id("run", 1))
    rollout = asyncio.create_task(proxy.generate("r", prompt_ids=[5], sampling_params=SAMPLING))
    done, _ = await asyncio.wait({rollout}, timeout=0.3)
    assert not done  # version 0 would answer, and must not
    await proxy.activate(version_id("run", 1))
    assert (await rollout).extra_fields["global_steps"] == 1


async def test_a_rollout_fails_with_the_reason_when_its_version_does_not_arrive(
    proxy: Any,
) -> None:
    await sync(proxy, version_id("run", 0))
    await proxy.expect(version_id("run", 1))
    rollout = asyncio.create_task(proxy.generate("r", prompt_ids=[5], sampling_params=SAMPLING))
    await asyncio.sleep(0)
    await proxy.give_up(version_id("run", 1), "the disk is full")
    with pytest.raises(SyncError, match="run-step-000001 did not arrive: the disk is full"):
        await rollout
    # the next one may come
    await proxy.expect(version_id("run", 2))
    with pytest.raises(SyncError, match="run-step-000001 arrived, .*run-step-000002 is expected"):
        await proxy.activate(version_id("run", 1))


async def test_a_version_that_nobody_sends_is_not_waited_for_without_end(
    start_server: Any,
) -> None:
    proxy = TokasaurusHttpServer(start_server().url, 6, client_options=PATIENCE, sync_timeout_s=0.2)
    await proxy.expect(version_id("run", 0))
    with pytest.raises(SyncError, match="did not arrive within 0 s"):
        await proxy.generate("r", prompt_ids=[5], sampling_params=SAMPLING)
    await proxy.close()


async def test_a_rollout_that_is_asked_for_ahead_takes_the_newest_version_that_is_there(
    proxy: Any,
) -> None:
    """It waits for the one on its way only where what is there is too old."""

    async def step_of_answer(oldest: int) -> int:
        params = {**SAMPLING, "oldest_step": oldest}
        out = await proxy.generate("r", prompt_ids=[5], sampling_params=params)
        return int(out.extra_fields["global_steps"])

    with pytest.raises(SyncError, match="no cartridge version was synced yet"):
        await step_of_answer(0)
    await sync(proxy, version_id("run", 0))
    with pytest.raises(SyncError, match="wants version 1 or newer; run-step-000000 is served"):
        await step_of_answer(1)
    await proxy.expect(version_id("run", 1))
    assert await step_of_answer(0) == 0
    late = asyncio.create_task(step_of_answer(1))
    done, _ = await asyncio.wait({late}, timeout=0.3)
    assert not done
    await proxy.activate(version_id("run", 1))
    assert await late == 1
    assert await step_of_answer(0) == 1
    await proxy.expect(version_id("run", 2))
    await proxy.give_up(version_id("run", 2), "the disk is full")
    assert await step_of_answer(1) == 1  # a rollout that needs no newer one goes on
    with pytest.raises(SyncError, match="run-step-000002 did not arrive: the disk is full"):
        await step_of_answer(2)


def test_versions_stay_as_long_as_a_rollout_may_ask_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the versions k-S to k, one is asked for by whatever is in flight when k arrives."""
    from verl_patches.rollout.tokasaurus_rollout import adapter as module

    monkeypatch.setattr(module.ray, "get", lambda waiting: waiting)  # no cluster is started
    for keep, ahead, left in ((2, 0, 2), (1, 0, 1), (2, 3, 4), (5, 3, 5)):
        retired: list[int] = []
        publisher = SimpleNamespace(
            publish=lambda *_: None, retire=retired.append, delete_runs=lambda *_: []
        )
        adapter: Any = SimpleNamespace(
            settings=SimpleNamespace(sync_keep=keep, async_steps=ahead), _started=True
        )
        module.ServerAdapter._publish(adapter, publisher, version_id("run", 9), None, [])  # type: ignore[arg-type]
        assert retired == [left]


class _Manager:
    """Stands for veRL's server manager: records the ids that leave the agent loop."""

    async def generate(
        self, *, request_id: str, prompt_ids: list[int], sampling_params: Any
    ) -> Any:
        from verl.workers.rollout.replica import TokenOutput

        self.prompt_ids = prompt_ids
        return TokenOutput(token_ids=[65], log_probs=[-0.1], extra_fields={"global_steps": 0})


def agent_loop(prompt_length: int, async_steps: int = 0) -> Any:
    from verl_patches.rollout.agent_loop import CartridgeAgentLoop

    rollout = SimpleNamespace(prompt_length=prompt_length)
    actor = SimpleNamespace(cartridge=SimpleNamespace(async_steps=async_steps))
    config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=rollout, actor=actor))
    return CartridgeAgentLoop(SimpleNamespace(config=config), _Manager(), byte_tokenizer())


async def test_a_started_answer_passes_unharmed() -> None:
    messages = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "The house stands by the s"},
    ]
    loop = agent_loop(100)
    out = await loop.run(SAMPLING, raw_prompt=messages, index=3)
    assert (
        out.prompt_ids == loop.server_manager.prompt_ids == render_prompt(loop.tokenizer, messages)
    )
    assert loop.tokenizer.decode(out.prompt_ids).endswith("The house stands by the s")


async def test_a_prompt_over_the_limit_is_refused_and_never_cut() -> None:
    messages = [{"role": "user", "content": "x" * 200}]
    with pytest.raises(ConfigError, match=r"over data.max_prompt_length=100 \(row 3\)"):
        await agent_loop(100).run(SAMPLING, raw_prompt=messages, index=3)


ROW = {"raw_prompt": [{"role": "user", "content": "Where?"}], "index": 3, "epoch": 1}


def seeded_loop(manager: Any, seed: int = 0, async_steps: int = 0) -> Any:
    loop = agent_loop(100, async_steps)
    loop._config.data = SimpleNamespace(seed=seed)
    loop.server_manager = manager
    return loop


async def test_each_rollout_has_a_seed_of_its_own() -> None:
    seen: list[int] = []

    class Manager(_Manager):
        async def generate(self, *, sampling_params: Any, **given: Any) -> Any:
            seen.append(sampling_params["seed"])
            return await super().generate(sampling_params=sampling_params, **given)

    loop = seeded_loop(Manager())
    for change in ({}, {"session_id": 1}, {"index": 4}, {"epoch": 2}, {}):
        await loop.run(SAMPLING, **{**ROW, "session_id": 0, **change})
    await seeded_loop(Manager(), seed=1).run(SAMPLING, **ROW, session_id=0)
    assert seen[0] == seen[4] and len(set(seen)) == 5  # the same rollout, the same seed
    assert "seed" not in SAMPLING  # which all rollouts of a batch share


async def test_a_rollout_says_how_old_its_version_may_be() -> None:
    """Of the step that it is trained at; in strict mode there is one version that may answer."""
    seen: list[Any] = []
    only: list[Any] = []

    class Manager(_Manager):
        async def generate(self, *, sampling_params: Any, **given: Any) -> Any:
            seen.append(sampling_params.get("oldest_step"))
            only.append(sampling_params.get("only_step"))
            return await super().generate(sampling_params=sampling_params, **given)

    for ahead in (0, 2):
        for step in (1, 7):
            loop = seeded_loop(Manager(), async_steps=ahead)
            await loop.run(SAMPLING, **ROW, session_id=0, global_steps=step)
    await agent_loop(100, 2).run(SAMPLING, **{k: v for k, v in ROW.items() if k != "epoch"})
    assert seen == [None, None, 0, 4]
    assert only == [0, 6, None, None]


async def test_a_run_with_a_retry_draws_what_one_without_draws(
    start_server: Any, tmp_path: Path
) -> None:
    """The server computes an answer, it is lost on the way, and the rollout is asked for again."""
    version = version_id("run", 0)
    write_cartridge(random_cartridge(tiny_model(), 16), tmp_path, version)

    async def rollouts(loses: bool, with_seed: bool) -> list[list[int]]:
        server = start_server(seed=7)
        lost: set[bytes] = set()

        def forward(asked: Asked) -> Answer:
            path, body = server.url + asked.path, asked.body
            kind = {"Content-Type": "application/json"}
            answer = httpx.request(asked.method, path, content=body, headers=kind, timeout=60)
            if loses and asked.path != "/ping" and body not in lost:
                lost.add(body)
                return 503, {}, b"lost"
            return answer.status_code, {}, answer.content

        with serving(forward) as way:
            proxy = TokasaurusHttpServer(way.url, 12, 259, client_options=PATIENCE, end_ids=[257])
            await sync(proxy, version)
            loop = seeded_loop(proxy)
            row = ROW if with_seed else {key: ROW[key] for key in ("raw_prompt", "index")}
            found = [(await loop.run(SAMPLING, **row, session_id=n)).response_ids for n in range(3)]
            await proxy.close()
            assert bool(lost) == loses
        return found

    smooth = await rollouts(loses=False, with_seed=True)
    assert await rollouts(loses=True, with_seed=True) == smooth
    assert len({tuple(ids) for ids in smooth}) == 3  # and the rollouts of a prompt differ
    # Without seeds the server counts, and a lost answer counts as one.
    assert await rollouts(True, False) != await rollouts(False, False)


def test_a_url_with_a_password_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="holds a user or a password") as failure:
        server_urls({"tokasaurus_url": ["http://a:1", "http://anna:hush@b:1"]})
    assert "hush" not in str(failure.value)
