"""The embedded server over HTTP: paths, fields, refusals, and an id that is loaded once."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.rollout.protocol import CartridgeRef
from cartridge_distill.server.running import BackgroundServer
from cartridge_distill.util.errors import RolloutError
from tests.conftest import StartServer
from tests.server.asking import COMPLETIONS, IDS, greedy, local, post, tokens
from tests.tiny import plain_logprobs, random_cartridge, write_cartridge


def test_ping_and_models(start_server: StartServer) -> None:
    server = start_server(model_name="tiny")
    assert httpx.get(server.url + "/ping").json() == {"message": "pong"}
    listed = httpx.get(server.url + "/v1/models").json()
    assert listed["object"] == "list"
    [card] = listed["data"]
    assert (card["id"], card["object"]) == ("tiny", "model")


def test_logprobs_over_http_are_the_tempered_ones(
    start_server: StartServer, llama: PreTrainedModel, tmp_path: Path
) -> None:
    """Many ragged requests at once, n choices each, against the plain forward."""
    cartridge = random_cartridge(llama, 32)
    write_cartridge(cartridge, tmp_path, "run-step-000001")
    server = start_server(seed=3)
    prompts = [[(7 * n + k) % 256 for k in range(1 + 5 * n)] for n in range(8)]

    async def ask() -> list[list[Completion]]:
        refs = [CartridgeRef(id="run-step-000001", source="local")]
        async with TokasaurusClient(server.url, vocab_size=259) as client:
            await client.wait_until_ready()
            calls = [client.complete(ids, 1 + len(ids) % 6, 0.7, refs, n=2) for ids in prompts]
            return await asyncio.gather(*calls)

    prefix = cartridge.prefix()
    for ids, completions in zip(prompts, asyncio.run(ask()), strict=True):
        assert len(completions) == 2
        for done in completions:
            wanted = plain_logprobs(llama, prefix, ids, done.token_ids, 0.7)
            assert done.logprobs == pytest.approx(wanted, abs=1e-5, rel=0)


def test_fingerprint_without_logprobs(start_server: StartServer) -> None:
    answer = post(start_server(), "/v1/completions", prompt=IDS, max_tokens=2).json()
    content = json.loads(answer["system_fingerprint"])
    assert set(content) == {
        "completion_ids",
        "packed_chosen_logprobs",
        "packed_topk_indices",
        "packed_topk_logprobs",
    }
    assert content["packed_chosen_logprobs"] is None
    assert answer["object"] == "text_completion"
    assert answer["usage"]["prompt_tokens"] == 4 and answer["usage"]["completion_tokens"] == 2


def test_an_id_is_loaded_once(
    start_server: StartServer, llama: PreTrainedModel, tmp_path: Path
) -> None:
    first, second = random_cartridge(llama, seed=1), random_cartridge(llama, seed=2)
    write_cartridge(first, tmp_path, "a")
    server = start_server()
    before = greedy(server, "a")
    shutil.rmtree(tmp_path / "a")
    write_cartridge(second, tmp_path, "a")
    ref = local("a")[0] | {"force_redownload": True}
    body: dict[str, Any] = {"prompt": IDS, "max_tokens": 8, "temperature": 0}
    assert tokens(post(server, COMPLETIONS, cartridges=[ref], **body)) == [before]
    write_cartridge(second, tmp_path, "b")
    assert greedy(server, "b") != before  # a new id brings the new weights
    shutil.rmtree(tmp_path / "a")
    assert greedy(server, "a") == before  # deleted on disk, still served
    assert httpx.get(server.url + "/custom/cartridge/loaded").json() == {"ids": ["a", "b"]}
    other = start_server()
    assert other.service.store.loaded_ids == []


def test_a_missing_cartridge_can_be_published_later(
    start_server: StartServer, llama: PreTrainedModel, tmp_path: Path
) -> None:
    server = start_server()
    refused = post(server, COMPLETIONS, prompt=IDS, cartridges=local("late"))
    assert refused.status_code == 400
    assert "late" in refused.json()["detail"] and "cartridge.pt" in refused.json()["detail"]
    write_cartridge(random_cartridge(llama), tmp_path, "late")
    assert greedy(server, "late")


def test_dropped_from_memory_is_refused_and_not_reloaded(
    start_server: StartServer, llama: PreTrainedModel, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        write_cartridge(random_cartridge(llama), tmp_path, name)
    server = start_server(cartridge_memory_gb=1e-9)
    assert greedy(server, "a") == greedy(server, "b")
    refused = post(server, COMPLETIONS, prompt=IDS, cartridges=local("a"))
    assert refused.status_code == 400 and "never loaded twice" in refused.json()["detail"]


def test_cartridges_join_in_alphabetical_order(
    start_server: StartServer, llama: PreTrainedModel, tmp_path: Path
) -> None:
    parts = {"a": random_cartridge(llama, 16, 1), "b": random_cartridge(llama, 32, 2)}
    for name, cartridge in parts.items():
        write_cartridge(cartridge, tmp_path, name)
    a, b = parts["a"].prefix(), parts["b"].prefix()
    joined = TrainableCache.from_prefix(
        type(a)(
            [torch.cat(pair, dim=2) for pair in zip(a.keys, b.keys, strict=True)],
            [torch.cat(pair, dim=2) for pair in zip(a.values, b.values, strict=True)],
        )
    )
    write_cartridge(joined, tmp_path, "joined")
    server = start_server()
    assert greedy(server, "b", "a") == greedy(server, "a", "b") == greedy(server, "joined")
    assert greedy(server, "a") != greedy(server, "a", "b")


def test_cartridges_that_cannot_be_served(
    start_server: StartServer, llama: PreTrainedModel, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    good = random_cartridge(llama)
    write_cartridge(random_cartridge(llama, tokens=20), root, "twenty")
    write_cartridge(good, root, "misstated")
    stated = {"kv_cache_initializer": {"max_tokens": 32}}
    (root / "misstated" / "config.yaml").write_text(yaml.safe_dump(stated))
    write_cartridge(good, root, "no-config")
    (root / "no-config" / "config.yaml").unlink()
    write_cartridge(good, root, "garbage")
    (root / "garbage" / "cartridge.pt").write_bytes(b"not a zip file")
    write_cartridge(good, root, "bad-yaml")
    (root / "bad-yaml" / "config.yaml").write_text("a: [")
    write_cartridge(good, root, "pickled")
    torch.save({"frozen_keys": os.getcwd}, root / "pickled" / "cartridge.pt")
    write_cartridge(good, tmp_path, "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "bare.pt").write_bytes(b"")
    server = start_server(cartridge_dir=root)
    for cartridge_id, says in {
        "twenty": "multiple of 16",
        "misstated": "max_tokens=32",
        "no-config": "config.yaml",
        "garbage": "garbage",
        "bad-yaml": "config.yaml",
        "pickled": "safely",
        "link": "link out of the cartridge directory",
        "../outside": "no cartridge.pt",
        str(tmp_path / "outside"): "no cartridge.pt",
        "bare.pt": "no cartridge.pt",
        "..": "no cartridge.pt",
        "": "empty",
        "x" * 3000: "cartridge",
    }.items():
        answer = post(server, COMPLETIONS, prompt=IDS, cartridges=local(cartridge_id))
        assert answer.status_code == 400, cartridge_id
        assert says in answer.json()["detail"], cartridge_id
    downloads = post(server, COMPLETIONS, prompt=IDS, cartridges=[{"id": "unknown"}])
    assert downloads.status_code == 400 and "downloads nothing" in downloads.json()["detail"]
    assert post(server, COMPLETIONS, prompt=IDS).status_code == 200  # and it lives on


def test_the_other_place_of_max_tokens_in_config(
    start_server: StartServer, llama: PreTrainedModel, tmp_path: Path
) -> None:
    write_cartridge(random_cartridge(llama), tmp_path, "wandb-style")
    nested = {"kv_cache_initializer": {"value": {"max_tokens": 16}}}
    (tmp_path / "wandb-style" / "config.yaml").write_text(yaml.safe_dump(nested))
    server = start_server()
    assert greedy(server, "wandb-style")
    by_default_source = post(server, COMPLETIONS, prompt=IDS, cartridges=[{"id": "wandb-style"}])
    assert by_default_source.status_code == 200  # it is there already


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (422, {"prompt": IDS, "unknown": 1}, "unknown"),
        (422, {"prompt": IDS, "cartridges": [{"id": "a", "source": "s3"}]}, "source"),
        (422, {"max_tokens": 4}, "prompt"),
        (400, {"prompt": ["a", "b"]}, "prompt"),
        (400, {"prompt": [[1, 2], [3]]}, "prompt"),
        (400, {"prompt": []}, "empty"),
        (400, {"prompt": [1, 259]}, "259"),
        (400, {"prompt": [-1]}, "-1"),
        (400, {"prompt": IDS, "echo": True}, "echo"),
        (400, {"prompt": IDS, "best_of": 2}, "best_of"),
        (400, {"prompt": IDS, "suffix": "x"}, "suffix"),
        (400, {"prompt": IDS, "top_p": 0.9}, "top_p"),
        (400, {"prompt": IDS, "frequency_penalty": 0.1}, "frequency_penalty"),
        (400, {"prompt": IDS, "presence_penalty": 0.1}, "presence_penalty"),
        (400, {"prompt": IDS, "logit_bias": {"3": 1.0}}, "logit_bias"),
        (400, {"prompt": IDS, "max_tokens": None}, "max_tokens"),
        (400, {"prompt": IDS, "max_tokens": 0}, "max_tokens=0"),
        (400, {"prompt": IDS, "max_tokens": 61}, "64"),
        (400, {"prompt": IDS, "logprobs": 1}, "max_topk_logprobs"),
        (400, {"prompt": IDS, "logprobs": -1}, "non-negative"),
        (400, {"prompt": IDS, "temperature": -0.5}, "temperature"),
        (400, {"prompt": IDS, "n": 0}, "n=0"),
        (200, {"prompt": IDS, "max_tokens": 60}, ""),
        (200, {"prompt": "text", "logprobs": 0, "n": 2, "seed": 3, "user": "u", "top_p": 1}, ""),
        (200, {"prompt": IDS, "stream": True, "metadata": {"a": 1}, "best_of": 1}, ""),
    ],
)
def test_refusals(
    refusing_server: BackgroundServer, status: int, body: dict[str, Any], says: str
) -> None:
    answer = post(refusing_server, COMPLETIONS, **body)
    assert answer.status_code == status, answer.text
    assert says in answer.text


def test_plain_paths_take_no_cartridges(refusing_server: BackgroundServer) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": IDS}),
        ("/v1/chat/completions", {"messages": [], "max_tokens": 1}),
    ):
        assert post(refusing_server, path, cartridges=[], **body).status_code == 422
    # What the real server's README names, and its code does not serve.
    assert post(refusing_server, "/v1/cartridge/completions", prompt=IDS).status_code == 404


def test_end_token_and_stop_strings(
    start_server: StartServer, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    server = start_server()
    body: dict[str, Any] = {"prompt": IDS, "max_tokens": 10, "temperature": 0}
    free = post(server, "/v1/completions", ignore_eos=True, **body)
    ids = tokens(free)[0]
    assert free.json()["choices"][0]["finish_reason"] == "length"
    server.service.end_ids = frozenset([ids[3]])
    ended = post(server, "/v1/completions", **body)
    assert tokens(ended)[0] == ids[: ids.index(ids[3]) + 1]
    [choice] = ended.json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == tokenizer.decode(ids[: ids.index(ids[3])], skip_special_tokens=True)
    assert tokens(post(server, "/v1/completions", ignore_eos=True, **body))[0] == ids


def test_stop_strings(start_server: StartServer) -> None:
    server = start_server()
    body: dict[str, Any] = {"max_tokens": 10, "temperature": 0, "ignore_eos": True}
    for first in range(40):  # until a random model writes something readable
        body["prompt"] = [first, 7]
        free = post(server, "/v1/completions", **body)
        text = free.json()["choices"][0]["text"]
        readable = [c for c in text[1:-2] if c.isascii() and c.isprintable() and c != text[0]]
        if readable:
            break
    stop = readable[0]
    stopped = post(server, "/v1/completions", stop=[stop, "never this"], **body)
    [choice] = stopped.json()["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert 0 < len(tokens(stopped)[0]) < len(tokens(free)[0])


def sampled(server: BackgroundServer, order: list[int]) -> dict[int, list[int]]:
    async def ask() -> list[list[Completion]]:
        async with TokasaurusClient(server.url) as client:
            return await asyncio.gather(*(client.complete([n, 5], 12, 1.0) for n in order))

    answers = asyncio.run(ask())
    return {n: done.token_ids for n, [done] in zip(order, answers, strict=True)}


def test_runs_repeat_whatever_the_order(start_server: StartServer) -> None:
    order = list(range(10))
    once = sampled(start_server(seed=5), order)
    assert sampled(start_server(seed=5, max_batch=3), order[::-1]) == once
    other = start_server(seed=6)
    assert sampled(other, order) != once
    assert sampled(other, order) != sampled(other, order)  # the same request again: a new draw


def test_a_client_that_leaves_frees_its_row(start_server: StartServer) -> None:
    server = start_server()
    body = {"model": "m", "prompt": IDS, "max_tokens": 500, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + COMPLETIONS, json=body, timeout=0.05)
    deadline = time.monotonic() + 20
    engine = server.service.engine
    while (engine._rows or not engine.stats.forwards) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats.new_tokens < 500
    assert post(server, COMPLETIONS, prompt=IDS, max_tokens=2).status_code == 200


def test_stopping_does_not_wait_for_rows(start_server: StartServer) -> None:
    server = start_server()

    async def leave() -> None:
        async with TokasaurusClient(server.url) as client:
            asking = asyncio.create_task(client.complete(IDS, 500, 1.0))
            while not server.service.engine.stats.new_tokens:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(server.service.engine.stop)
            asking.cancel()
            with pytest.raises((RolloutError, asyncio.CancelledError)):
                await asking

    asyncio.run(leave())
    refused = post(server, COMPLETIONS, prompt=IDS, max_tokens=2)
    assert refused.status_code == 503 and "shutting down" in refused.json()["detail"]


# --- the command line -------------------------------------------------------------------------
