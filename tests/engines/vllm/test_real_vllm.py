"""A real vLLM behind the gateway: what it answers, what it refuses, and what it survives.

Long, and skipped where there is no vLLM: see ``rigs``. A start takes one to two minutes, so most
tests share one; each looks at versions of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from transformers import PreTrainedModel

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.rollout.answers import read_answer
from tests.engines.vllm.rigs import (
    MAX_TOKENS,
    PROMPTS,
    ask,
    ask_all,
    model,
    prefix,
    put,
    serving,
    worst,
)
from tests.gateway.rig import COMPLETIONS, Rig, completion, until
from tests.tiny import byte_tokenizer, plain_logprobs

pytestmark = [pytest.mark.long, pytest.mark.integration, pytest.mark.timeout(1800)]

EXACT = 1e-4
"""In float32, between two implementations of one sum."""


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return model("llama")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("vllm")
    # With vLLM's own route for token ids, which takes what a client writes into a request.
    with serving("llama", folder, "--enable-scale-out", options=("--keep-versions", 8)) as found:
        yield found


def test_sixteen_prompts_of_two_versions_and_none_in_one_batch(
    rig: Rig, llama: PreTrainedModel
) -> None:
    first, second = prefix(llama, 1, 128), prefix(llama, 2, 48)
    assert put(rig, "mixed-step-000001", first).status_code == 201
    assert put(rig, "mixed-step-000002", second).status_code == 201
    kinds: list[tuple[list[str], Prefix | None]] = [
        (["mixed-step-000001"], first),
        (["mixed-step-000002"], second),
        ([], None),
    ]
    asked = [(versions, prompt) for prompt in PROMPTS for versions, _ in kinds]
    found = ask_all(rig, asked)
    given = [one for _ in PROMPTS for _, one in kinds]
    off = [
        worst(llama, one, prompt, answer)
        for one, (_, prompt), answer in zip(given, asked, found, strict=True)
    ]
    assert max(off) < EXACT
    # The check can fail: the same answers, held against another version.
    other = [worst(llama, second, prompt, found[3 * n]) for n, prompt in enumerate(PROMPTS)]
    assert min(other) > 100 * EXACT


def test_the_oracle(rig: Rig, llama: PreTrainedModel) -> None:
    """A cartridge that is a document's KV answers as the document itself does."""
    document = [(7 * place) % 250 for place in range(64)]
    with torch.no_grad():
        cache = llama(torch.tensor([document]), use_cache=True).past_key_values
    kv = Prefix([one.keys for one in cache.layers], [one.values for one in cache.layers])
    assert put(rig, "oracle", kv).status_code == 201
    behind = ask_all(rig, [(["oracle"], prompt) for prompt in PROMPTS], temperature=0.0)
    read = ask_all(rig, [([], document + prompt) for prompt in PROMPTS], temperature=0.0)
    assert [one.token_ids for one in behind] == [one.token_ids for one in read]
    for one, other in zip(behind, read, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=EXACT)


def test_several_cartridges_are_joined_by_name(rig: Rig, llama: PreTrainedModel) -> None:
    one, two = prefix(llama, 3, 32), prefix(llama, 4, 16)
    put(rig, "join-b", two)
    put(rig, "join-a", one)
    joined = Prefix(
        [torch.cat(pair, 2) for pair in zip(one.keys, two.keys, strict=True)],
        [torch.cat(pair, 2) for pair in zip(one.values, two.values, strict=True)],
    )
    [answer] = ask(rig, ["join-b", "join-a"], PROMPTS[3])
    assert worst(llama, joined, PROMPTS[3], answer) < EXACT


def test_a_version_that_comes_while_requests_run(rig: Rig, llama: PreTrainedModel) -> None:
    versions = {step: prefix(llama, 10 + step, 64) for step in range(1, 5)}
    put(rig, "live-step-000001", versions[1])
    done: list[tuple[int, int, Any]] = []
    stop = threading.Event()

    def load(number: int) -> None:
        while not stop.is_set():
            newest = max(step for step in versions if f"live-step-{step:06d}" in uploaded)
            prompt = PROMPTS[number % len(PROMPTS)]
            done.append((newest, number, ask(rig, [f"live-step-{newest:06d}"], prompt, 32)[0]))

    uploaded = {"live-step-000001"}
    threads = [threading.Thread(target=load, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for step in (2, 3, 4):
        before = len(done)
        until(lambda before=before: len(done) > before + 16, "answers come", 120)
        assert put(rig, f"live-step-{step:06d}", versions[step]).status_code == 201
        uploaded.add(f"live-step-{step:06d}")
    until(lambda: any(step == 4 for step, _, _ in done), "the newest version answers", 120)
    stop.set()
    for thread in threads:
        thread.join()
    assert {step for step, _, _ in done} == {1, 2, 3, 4}
    for step, number, answer in done:
        prompt = PROMPTS[number % len(PROMPTS)]
        assert worst(llama, versions[step], prompt, answer) < EXACT


def test_two_hundred_versions_do_not_grow(rig: Rig, llama: PreTrainedModel) -> None:
    def memory() -> int:
        processes = [rig.server, *rig.server.children(recursive=True)]
        return sum(process.memory_info().rss for process in processes)

    given = prefix(llama, 5, 128)
    size = 2 * 2 * 2 * 32 * 128 * 4
    before = 0
    for step in range(1, 201):
        changed = Prefix([key + step * 1e-3 for key in given.keys], given.values)
        assert put(rig, f"many-step-{step:06d}", changed).status_code == 201
        if step % 50 == 0:
            [answer] = ask(rig, [f"many-step-{step:06d}"], PROMPTS[0])
            assert worst(llama, changed, PROMPTS[0], answer) < EXACT
        if step == 50:
            before = memory()  # the first ones fill what is bounded
    grown = memory() - before
    # 150 versions are 10 MB here; nothing near that many of them may be kept beside the bound.
    assert grown < 150 * size + 50e6, f"{grown / 1e6:.0f} MB"


def test_a_request_repeats_by_its_seed(rig: Rig, llama: PreTrainedModel) -> None:
    put(rig, "seeds", prefix(llama, 6, 32))
    one, two = (ask(rig, ["seeds"], PROMPTS[1], 32, seed=5, n=3, temperature=1.0) for _ in "ab")
    assert [c.token_ids for c in one] == [c.token_ids for c in two]
    assert len({tuple(c.token_ids) for c in one}) == 3
    [other] = ask(rig, ["seeds"], PROMPTS[1], 32, seed=6, temperature=1.0)
    assert other.token_ids != one[0].token_ids


def test_a_stop_string_ends_the_answer_with_its_tokens(rig: Rig, llama: PreTrainedModel) -> None:
    put(rig, "stops", prefix(llama, 7, 32))
    [whole] = ask(rig, ["stops"], PROMPTS[2], 48, temperature=0.7, seed=1)
    letters = [byte_tokenizer().decode([token]) for token in whole.token_ids]
    place = next(
        place
        for place, letter in enumerate(letters)
        if place > 2 and letter.isascii() and letter.isprintable() and letter not in letters[:place]
    )
    refs = [{"id": "stops", "source": "local"}]
    body = completion(None, 48, prompt=PROMPTS[2], cartridges=refs, ignore_eos=True, seed=1)
    answer = rig.http.post(COMPLETIONS, json=body | {"stop": letters[place]}).json()
    [found] = read_answer(answer, 1, 48)
    assert found.token_ids == whole.token_ids[: place + 1] and found.finish_reason == "stop"
    assert letters[place] not in answer["choices"][0]["text"]


def test_an_end_token_is_the_last_one_and_counts(rig: Rig, llama: PreTrainedModel) -> None:
    put(rig, "ends", prefix(llama, 7, 32))
    refs = [{"id": "ends", "source": "local"}]
    end = byte_tokenizer().eos_token_id
    ended = 0
    for prompt in PROMPTS[:8]:
        body = completion(None, 60, prompt=prompt, cartridges=refs, temperature=2.0, n=8)
        for found in read_answer(
            rig.http.post(COMPLETIONS, json=body).json(), 8, 60, end_ids={end}
        ):
            assert end not in found.token_ids[:-1]
            ended += found.finish_reason == "stop"
            off = worst(llama, prefix(llama, 7, 32), prompt, found, temperature=2.0)
            assert off < EXACT
    assert ended > 0


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"echo": True}, "echo"),
    ({"logprobs": 3}, "logprobs=3"),
    ({"top_p": 0.9}, "top_p"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"logit_bias": {"5": 1.0}}, "logit_bias"),
    ({"best_of": 2}, "best_of"),
    ({"prompt": []}, "empty"),
    ({"prompt": [5000]}, "5000"),
    ({"temperature": 0.001}, "temperature=0.001"),
    ({"max_tokens": MAX_TOKENS}, "limit"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED)
def test_what_is_not_served_is_http_400(
    rig: Rig, llama: PreTrainedModel, changes: dict[str, Any], named: str
) -> None:
    put(rig, "refusals", prefix(llama, 8, 32))
    answer = rig.http.post(COMPLETIONS, json=completion("refusals", **changes))
    assert answer.status_code == 400 and named in answer.json()["detail"]


def test_the_server_itself_knows_no_other_cartridges(rig: Rig, llama: PreTrainedModel) -> None:
    put(rig, "known", prefix(llama, 8, 32))
    answer = httpx.post(rig.server_url() + COMPLETIONS, json=completion("unknown"), timeout=60)
    assert answer.status_code == 400 and "'unknown'" in answer.json()["detail"]
    assert ask(rig, ["known"], PROMPTS[0])


_BY_HAND = {"ids": ["by-hand"], "tokens": 32, "content": "0" * 64}


@pytest.mark.parametrize(
    ("parameters", "sampling"),
    [
        ({"cartridge": "by-hand"}, {}),
        ({"cartridge": _BY_HAND}, {}),
        ({"cartridge": _BY_HAND | {"tokens": 3}}, {}),
        ({"cartridge": _BY_HAND}, {"prompt_logprobs": 0}),
        ({"cartridge": _BY_HAND}, {"repetition_penalty": 1.2}),
        ({"do_remote_prefill": True}, {}),
    ],
)
def test_a_request_past_the_front_fails_and_the_engine_lives(
    rig: Rig, llama: PreTrainedModel, parameters: dict[str, Any], sampling: dict[str, Any]
) -> None:
    """vLLM's own route for token ids takes what it is given: the connector does not."""
    put(rig, "by-hand", prefix(llama, 8, 32))
    body: dict[str, Any] = {
        "token_ids": [0] * 32 + [10, 20],
        "sampling_params": {"max_tokens": 4, "temperature": 0.0, **sampling},
    }
    route = rig.server_url() + "/inference/v1/generate"
    assert httpx.post(route, json=body, timeout=120).status_code == 200
    failed = rig.log.count(" is failed: ")
    answer = httpx.post(route, json=body | {"kv_transfer_params": parameters}, timeout=120)
    assert answer.status_code >= 400, answer.text
    assert rig.log.count(" is failed: ") > failed
    found = ask_all(rig, [(["by-hand"], prompt) for prompt in PROMPTS[:4]])
    off = [
        worst(llama, prefix(llama, 8, 32), prompt, one)
        for prompt, one in zip(PROMPTS, found, strict=False)
    ]
    assert max(off) < EXACT


def test_a_version_of_another_shape_is_refused(rig: Rig) -> None:
    wrong = model("llama")
    wrong.config.num_key_value_heads = 1
    answer = put(rig, "wrong-shape", prefix(wrong, 1, 16))
    assert answer.status_code == 422 and "kv_heads" in answer.json()["detail"]


def test_chat_through_the_gateway(rig: Rig, llama: PreTrainedModel) -> None:
    put(rig, "chat", prefix(llama, 9, 32))
    body = {"model": "chat", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
    answer = rig.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] <= 8
    assert answer.json()["model"] == "chat"


def test_killed_in_the_middle_of_rollouts(rig: Rig, llama: PreTrainedModel) -> None:
    """The engine's process, then the server's: requests in flight are asked for again."""
    given = prefix(llama, 11, 64)
    put(rig, "killed-step-000001", given)
    for kill_engine in (True, False):
        answers: list[Any] = []

        def roll(prompt: list[int], answers: list[Any] = answers) -> None:
            refs = [{"id": "killed-step-000001", "source": "local"}]
            body = completion(None, 64, prompt=prompt, cartridges=refs, ignore_eos=True)
            while True:
                answer = rig.http.post(COMPLETIONS, json=body, timeout=600)
                if answer.status_code == 200:
                    answers.append((prompt, answer.json()))
                    return
                assert answer.status_code in (500, 503), answer.text

        threads = [threading.Thread(target=roll, args=(prompt,)) for prompt in PROMPTS]
        for thread in threads:
            thread.start()
        server = rig.server
        victim = next(_engines(server)) if kill_engine else server
        family = [server, *server.children(recursive=True)]
        victim.kill()
        for thread in threads:
            thread.join()
        assert len(answers) == len(PROMPTS)
        for process in family:  # nobody is left who holds the device
            until(lambda process=process: _is_gone(process), f"{process} has ended", 60)
        for prompt, body in answers:
            [answer] = read_answer(body, 1, 64)
            assert worst(llama, given, prompt, answer) < EXACT


def test_nothing_outlives_a_gateway_that_is_killed(rig: Rig) -> None:
    """The last one that uses the gateway: vLLM's processes would keep the device."""
    server = rig.server
    family = [server, *server.children(recursive=True)]
    assert len(family) > 1
    rig.process.kill()
    for process in family:
        until(lambda process=process: _is_gone(process), f"{process} has ended", 60)


def _engines(server: psutil.Process) -> Iterator[psutil.Process]:
    for child in server.children(recursive=True):
        if "EngineCore" in " ".join(child.cmdline()):
            yield child


def _is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("kind", ["gemma3", "qwen3"])
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    """Gemma 3's window of 24 tokens is shorter than the cartridges."""
    source = model(kind)
    with serving(kind, tmp_path) as rig:
        given = {f"arch-{tokens}": prefix(source, tokens, tokens) for tokens in (16, 48, 128)}
        for name, one in given.items():
            assert put(rig, name, one).status_code == 201
        asked = [([name], prompt) for prompt in PROMPTS for name in given]
        found = ask_all(rig, asked)
        off = [
            worst(source, given[name], prompt, answer)
            for ([name], prompt), answer in zip(asked, found, strict=True)
        ]
        assert max(off) < EXACT


def test_prompts_in_pieces_and_a_cache_that_is_too_small(
    tmp_path: Path, llama: PreTrainedModel
) -> None:
    """Chunked prefill, and requests that vLLM takes out and lets in again."""
    small = ("--enable-chunked-prefill", "--max-num-batched-tokens", 32, "--max-num-seqs", 16)
    cache = ("--num-gpu-blocks-override", 16, "--block-size", 32)  # one request of the longest
    with serving("llama", tmp_path, *small, *cache) as rig:
        one, two = prefix(llama, 1, 64), prefix(llama, 2, 48)
        put(rig, "small-a", one)
        put(rig, "small-b", two)
        long = [[(number + 3 * place) % 250 for place in range(70)] for number in range(8)]
        asked = [([name], prompt) for prompt in long for name in ("small-a", "small-b")]
        found = ask_all(rig, asked, max_tokens=60)
        off = [
            worst(llama, one if name == "small-a" else two, prompt, answer)
            for ([name], prompt), answer in zip(asked, found, strict=True)
        ]
        assert max(off) < EXACT
        metrics = httpx.get(rig.server_url() + "/metrics").text
        preempted = [line for line in metrics.splitlines() if "num_preemptions_total{" in line]
        assert preempted and float(preempted[0].split()[-1]) > 0
        body = completion("small-a", prompt=long[0], seed=3)
        answer = rig.http.post(COMPLETIONS, json=body)
        assert answer.status_code == 400 and "--no-enable-chunked-prefill" in answer.text


def test_bfloat16(tmp_path: Path, llama: PreTrainedModel) -> None:
    """The bound that was measured, for a model that is served in bfloat16."""
    with serving("llama", tmp_path, dtype="bfloat16") as rig:
        given = prefix(llama, 1, 64)
        put(rig, "rounded", given, torch.bfloat16)
        found = ask_all(rig, [(["rounded"], prompt) for prompt in PROMPTS], temperature=1.0)
        off = []
        for prompt, answer in zip(PROMPTS, found, strict=True):
            want = plain_logprobs(llama, given, prompt, answer.token_ids)
            off += [abs(a - b) for a, b in zip(answer.logprobs, want, strict=True)]
        print(f"bfloat16 against float32: mean {sum(off) / len(off):.4f}, largest {max(off):.4f}")
        assert sum(off) / len(off) < 0.05
