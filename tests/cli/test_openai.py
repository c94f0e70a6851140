"""`cartridge-distill serve --cartridge` as a process; the client is OpenAI's own.

What the API takes and answers is tested in tests/server/openai.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from typer.testing import CliRunner

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, save_cartridge
from cartridge_distill.cli.main import app
from cartridge_distill.model.prompts import render_prompt
from tests.docs.pages import marked_blocks, text_of
from tests.gateway.rig import until
from tests.server.openai import strict
from tests.tiny import byte_tokenizer, plain_distributions, random_cartridge, tiny_model
from tests.training.conftest import ROOT, child_environment

pytestmark = pytest.mark.integration
QUESTION = [{"role": "user", "content": "What is it?"}]
PAGE = ROOT / "docs" / "serving.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server's cartridges and its log lie."""
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def client(model_folder: Path, folder: Path) -> Iterator[openai.OpenAI]:
    options: list[str] = []
    for seed, name in enumerate(("anna", "ben.v2")):
        source = save_cartridge(
            random_cartridge(tiny_model(), 16, seed), folder / name, CartridgeMeta(base_model="t")
        )
        options += ["--cartridge", f"{name}={source}"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "cartridge_distill.cli.main", "serve"]
    command += ["--model", str(model_folder), "--port", str(port), "--threads", "1", *options]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=child_environment(), stdout=log, stderr=subprocess.STDOUT
        )

    http = httpx.Client(base_url=f"http://127.0.0.1:{port}")  # its TLS context is made once

    def up() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            return http.get("/ping").status_code == 200
        except httpx.HTTPError:
            return False

    try:
        with http:
            until(up, "the server")
        url = f"http://127.0.0.1:{port}/v1"
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    finally:
        process.terminate()
        process.wait(30)


def expected(seed: int | None, length: int) -> str:
    """The greedy answer, by plain forwards."""
    tokenizer, model = byte_tokenizer(), tiny_model()
    prefix = None if seed is None else random_cartridge(model, 16, seed).prefix()
    prompt, new = render_prompt(tokenizer, QUESTION), list[int]()
    if seed is None:
        text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
    for _ in range(length):
        token = int(plain_distributions(model, prefix, prompt, [*new, 0])[-1].argmax())
        new.append(token)
        if token == 257:
            break
    return str(tokenizer.decode(new, skip_special_tokens=True))


def test_each_cartridge_is_a_model(client: openai.OpenAI, model_folder: Path) -> None:
    names = [model.id for model in client.models.list()]
    assert names == [str(model_folder), "anna", "ben.v2"]
    answers = {}
    for seed, name in ((0, "anna"), (1, "ben.v2"), (None, str(model_folder))):
        answer = client.chat.completions.create(
            model=name, messages=QUESTION, max_tokens=12, temperature=0
        )
        assert answer.choices[0].message.content == expected(seed, 12)
        assert answer.usage is not None and answer.usage.completion_tokens <= 12
        answers[name] = answer.choices[0].message.content
    assert len(set(answers.values())) == 3


def test_tokens_are_streamed_as_they_come(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="anna",
        messages=QUESTION,
        max_tokens=40,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    deltas = [c.choices[0].delta.content for c in chunks if c.choices]
    pieces = [delta for delta in deltas if delta]
    assert len(pieces) > 3
    assert "".join(pieces) == expected(0, 40)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 3


def test_a_stream_never_takes_back_what_a_stop_string_cuts(client: openai.OpenAI) -> None:
    whole = expected(0, 40)
    found = re.compile(r"[ -~]{2,3}").search(whole, len(whole) // 3)  # no half characters
    assert found is not None
    stop = found.group()
    asked = {"model": "anna", "messages": QUESTION, "max_tokens": 40, "temperature": 0}
    plain = client.chat.completions.create(**asked, stop=[stop])  # type: ignore[call-overload]
    stream = client.chat.completions.create(**asked, stop=[stop], stream=True)  # type: ignore[call-overload]
    text = "".join(c.choices[0].delta.content or "" for c in stream)
    assert text == plain.choices[0].message.content == whole[: whole.index(stop)]


def test_errors_are_openais(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model 'carl' is not here; here are: .*anna"):
        client.chat.completions.create(model="carl", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.chat.completions.create(model="anna", messages=QUESTION, top_p=0.5)
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="anna", messages="no list")  # type: ignore[arg-type]
    with pytest.raises(openai.APIError, match="maximum context length"):
        stream = client.chat.completions.create(
            model="anna", messages=QUESTION, max_tokens=10_000, stream=True
        )
        list(stream)


def test_sampled_answers_differ_and_can_be_several(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="anna", messages=QUESTION, max_tokens=8, temperature=1.0, n=3
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1


def bash(script: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_of_the_page_work_as_they_are_written(client: openai.OpenAI) -> None:
    """But for the port."""
    base = str(client.base_url).rstrip("/")
    [curls] = marked_blocks(PAGE, "chat-api")
    assert curls.count("curl http://127.0.0.1:8000/v1") == 2
    models, answer = bash(curls.replace("http://127.0.0.1:8000/v1", base)).split("}{", 1)
    assert "anna" in models
    assert json.loads("{" + answer)["choices"][0]["message"]["role"] == "assistant"
    [script] = re.findall(r"^```python\n(.*?)^```$", text_of(PAGE), re.M | re.S)
    assert 'base_url="http://127.0.0.1:8000/v1"' in script
    done = subprocess.run(
        [sys.executable, "-c", script.replace("http://127.0.0.1:8000/v1", base)],
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout


def test_the_command_that_serve_prints_works_when_pasted(
    client: openai.OpenAI, folder: Path
) -> None:
    [printed] = re.findall(r"^  (curl .*)$", (folder / "log").read_text(), re.M)
    answer = httpx.Response(200, content=bash(f"{printed} --silent").encode())
    assert strict.completion(answer).model == "anna"


def test_a_cartridge_of_another_model_is_refused(model_folder: Path, tmp_path: Path) -> None:
    from cartridge_distill.cartridge.prefix import Prefix
    from cartridge_distill.cartridge.trainable import TrainableCache

    three = [torch.zeros(1, 2, 16, 16)] * 3
    save_cartridge(TrainableCache(Prefix(three, three)), tmp_path / "c", CartridgeMeta("x"))
    options = ["--model", str(model_folder), "--cartridge", f"c={tmp_path / 'c'}", "--port", "0"]
    done = CliRunner().invoke(app, ["serve", *options])
    assert done.exit_code == 1 and "3 layers" in done.output


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}], ids=str
)
def test_a_page_of_another_name_reads_nothing(
    client: openai.OpenAI, headers: dict[str, str]
) -> None:
    """DNS rebinding: its name points here, and the cartridge would be its to read."""
    with pytest.raises(openai.PermissionDeniedError, match="--allow-host"):
        client.models.list(extra_headers=headers)
    with pytest.raises(openai.PermissionDeniedError, match="--allow-host"):
        client.chat.completions.create(
            model="anna",
            messages=[{"role": "user", "content": "What is it?"}],
            extra_headers=headers,
        )
