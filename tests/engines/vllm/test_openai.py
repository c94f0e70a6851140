"""OpenAI's own client against a real vLLM that ``cartridge-distill serve --engine vllm`` started.

Long, and skipped where there is no vLLM: see ``rigs``. What the routes answer in general is tested
in ``tests/server/openai``, on the embedded server.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from transformers import PreTrainedModel

from cartridge_distill.cartridge.checkpoint import write_cartridge
from cartridge_distill.cartridge.formats.stored_cartridge import CartridgeMeta, StoredCartridge
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.model.prompts import render_prompt
from tests.engines.vllm.rigs import model, vllm_python
from tests.gateway.rig import until
from tests.server.openai import strict
from tests.tiny import byte_tokenizer, plain_distributions, random_cartridge, save_model
from tests.training.conftest import child_environment

pytestmark = [pytest.mark.long, pytest.mark.integration, pytest.mark.timeout(900)]

KEY = "a-key"
QUESTION: Any = [{"role": "user", "content": "What is it?"}]
TOKENS = {"anna": 32, "ben.v2": 24}  # the second is no multiple of vLLM's block


@dataclass(frozen=True)
class Served:
    """A running server, its cartridges' folder, and what it was started with."""

    url: str
    folder: Path
    model: str
    process: subprocess.Popen[bytes]

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def post(self, **body: Any) -> httpx.Response:
        """The same as the client sends, for the answer's bytes."""
        headers = {"Authorization": f"Bearer {KEY}"}
        route = f"{self.url}/v1/chat/completions"
        return httpx.post(route, json=body, headers=headers, timeout=120)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return model("llama")


def store(source: PreTrainedModel, place: Path, tokens: int, seed: int) -> None:
    cartridge = random_cartridge(source, tokens, seed)
    state = Snapshot.take(cartridge.state_dict(), torch.float32)
    write_cartridge(StoredCartridge(state, CartridgeMeta("tiny")), place, "native")


@pytest.fixture(scope="module")
def served(llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    python, folder = vllm_python(), tmp_path_factory.mktemp("openai")
    save_model(llama, folder / "model")
    named: list[str] = []
    for seed, (name, tokens) in enumerate(TOKENS.items()):
        store(llama, folder / name, tokens, seed)
        named += ["--cartridge", f"{name}={folder / name}"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "cartridge_distill.cli.main", "serve", *named]
    command += ["--model", str(folder / "model"), "--port", str(port), "--dtype", "float32"]
    command += ["--engine", "vllm", "--engine-python", python, "--", "--api-key", KEY]
    given = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=child_environment() | given, stdout=log, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"

    def up() -> bool:
        assert process.poll() is None, (folder / "log").read_text()[-4000:]
        try:
            return httpx.get(f"{url}/ping").status_code == 200
        except httpx.HTTPError:
            return False

    family: list[psutil.Process] = []
    try:
        until(up, "vLLM", 300)
        yield Served(url, folder, str(folder / "model"), process)
        family = psutil.Process(process.pid).children(recursive=True)
        assert family, "vLLM runs in processes of its own"
    finally:
        process.terminate()
        status = process.wait(60)
    assert status == 0
    assert not psutil.wait_procs(family, timeout=30)[1], "they outlive the command"


def prefix(source: PreTrainedModel, name: str, seed: int) -> Prefix:
    with torch.no_grad():
        return random_cartridge(source, TOKENS[name], seed).prefix()


def greedy(source: PreTrainedModel, given: Prefix | None, length: int) -> tuple[list[int], str]:
    """The likeliest answer to the question, by plain forwards: ids and text."""
    tokenizer = byte_tokenizer()
    prompt = render_prompt(tokenizer, QUESTION)
    if given is None:
        text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
    new: list[int] = []
    while len(new) < length and tokenizer.eos_token_id not in new:
        new.append(int(plain_distributions(source, given, prompt, [*new, 0])[-1].argmax()))
    return new, str(tokenizer.decode(new, skip_special_tokens=True))


def test_each_cartridge_is_a_model(served: Served, llama: PreTrainedModel) -> None:
    client = served.client()
    assert [card.id for card in client.models.list()] == [served.model, *TOKENS]
    answers = {}
    for seed, name in enumerate((*TOKENS, served.model)):
        given = prefix(llama, name, seed) if name in TOKENS else None
        ids, text = greedy(llama, given, 16)
        answer = client.chat.completions.create(
            model=name, messages=QUESTION, max_tokens=16, temperature=0
        )
        assert answer.choices[0].message.content == text and answer.model == name
        assert answer.usage is not None and answer.usage.completion_tokens == len(ids)
        answers[name] = text
    assert len(set(answers.values())) == 3


def test_an_answer_is_openais_with_its_log_probs(served: Served, llama: PreTrainedModel) -> None:
    asked: dict[str, Any] = {"model": "ben.v2", "messages": QUESTION, "max_completion_tokens": 12}
    answer = served.post(**asked, temperature=0, logprobs=True, top_logprobs=3)
    [choice] = strict.completion(answer).choices
    given = prefix(llama, "ben.v2", 1)
    ids, _ = greedy(llama, given, 12)
    assert choice.logprobs is not None and choice.logprobs.content is not None
    prompt = render_prompt(byte_tokenizer(), QUESTION)
    rows = plain_distributions(llama, given, prompt, ids)
    # The end token is none of the text, and has no entry.
    for entry, row, token in zip(choice.logprobs.content, rows, ids, strict=False):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        likeliest = [one.logprob for one in entry.top_logprobs]
        assert likeliest == pytest.approx(sorted(row.tolist(), reverse=True)[:3], abs=1e-4)


def test_tokens_are_streamed_as_they_come(served: Served, llama: PreTrainedModel) -> None:
    asked: dict[str, Any] = {"model": "anna", "messages": QUESTION, "max_tokens": 40}
    asked |= {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    ids, text = greedy(llama, prefix(llama, "anna", 0), 40)
    chunks = list(served.client().chat.completions.create(**asked))
    pieces = [c.choices[0].delta.content for c in chunks if c.choices]
    assert "".join(piece or "" for piece in pieces) == text
    assert sum(bool(piece) for piece in pieces) > 3
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == len(ids)
    assert strict.chunks(served.post(**asked))


def test_streams_of_all_models_at_once(served: Served, llama: PreTrainedModel) -> None:
    """One batch of vLLM's with both cartridges and none."""
    names = [*TOKENS, served.model] * 4
    client = served.client()

    def read(name: str) -> str:
        stream = client.chat.completions.create(
            model=name, messages=QUESTION, max_tokens=24, temperature=0, stream=True
        )
        return "".join(c.choices[0].delta.content or "" for c in stream)

    with ThreadPoolExecutor(len(names)) as pool:
        found = list(pool.map(read, names))
    wanted = {served.model: greedy(llama, None, 24)[1]}
    for seed, name in enumerate(TOKENS):
        wanted[name] = greedy(llama, prefix(llama, name, seed), 24)[1]
    assert found == [wanted[name] for name in names]


def test_a_stream_that_is_left_ends_the_request(served: Served) -> None:
    def running() -> float:
        lines = httpx.get(f"{served.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if "num_requests_running{" in line)

    stream = served.client().chat.completions.create(
        model="anna", messages=QUESTION, max_tokens=400, stream=True, n=4
    )
    next(iter(stream))
    until(lambda: running() > 0, "the request runs", 30)
    stream.close()
    until(lambda: running() == 0, "the request is over", 30)


def test_what_is_not_served_is_refused_in_openais_words(served: Served) -> None:
    client = served.client()
    asked: dict[str, Any] = {"messages": QUESTION, "max_tokens": 4}
    with pytest.raises(openai.NotFoundError, match="'carl' is not here; here are: .*anna"):
        client.chat.completions.create(model="carl", **asked)
    with pytest.raises(openai.BadRequestError, match="frequency_penalty"):
        client.chat.completions.create(model="anna", frequency_penalty=0.5, **asked)
    with pytest.raises(openai.BadRequestError, match="0.001"):
        client.chat.completions.create(model="anna", temperature=0.001, **asked)
    with pytest.raises(openai.AuthenticationError):
        served.client("another-key").chat.completions.create(model="anna", **asked)


def test_a_cartridge_that_is_trained_again_is_served_anew(
    served: Served, llama: PreTrainedModel, tmp_path: Path
) -> None:
    """The last one that looks at ben.v2: its file is another afterwards."""
    client, name = served.client(), "ben.v2"
    for seed in (1, 7):
        if seed == 7:
            store(llama, tmp_path / "again", TOKENS[name], seed)
            for file in (tmp_path / "again").iterdir():
                os.replace(file, served.folder / name / file.name)
        answer = client.chat.completions.create(
            model=name, messages=QUESTION, max_tokens=16, temperature=0
        )
        text = greedy(llama, prefix(llama, name, seed), 16)[1]
        assert answer.choices[0].message.content == text
