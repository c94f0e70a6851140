"""Who may come in, and how much they may ask for."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.rig import COMPLETIONS, TOKEN, Rig, completion, until, upload_bytes

pytestmark = pytest.mark.integration

ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("GET", "/metrics"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/nowhere"),
    ("GET", "/cartridges"),
    ("GET", "/cartridges/x"),
    ("PUT", "/cartridges/x"),
    ("DELETE", "/cartridges/x"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", COMPLETIONS),
    ("POST", "/custom/cartridge/chat/completions"),
]


@pytest.fixture(scope="module")
def stranger() -> Iterator[httpx.Client]:
    """Without the token."""
    with httpx.Client() as client:
        yield client


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_everything_but_ping_needs_the_token(
    rig: Rig, stranger: httpx.Client, method: str, path: str
) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": TOKEN},
    ):
        answer = stranger.request(method, rig.url + path, headers=headers)
        assert answer.status_code == 401, (headers, answer.text)
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert stranger.get(rig.url + "/ping").json() == {"message": "pong"}
    assert TOKEN not in rig.log and "wrong" not in rig.log


def test_the_servers_endpoints_are_passed_through(rig: Rig) -> None:
    models = rig.http.get("/v1/models").json()["data"]
    assert [card["id"] for card in models] == ["tiny"]
    plain = {"model": "m", "prompt": "Hello", "max_tokens": 3}
    assert rig.http.post("/v1/completions", json=plain).json()["usage"]["completion_tokens"] > 0
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    answer = rig.http.post("/v1/chat/completions", json=chat).json()
    assert answer["object"] == "chat.completion"
    with rig.http.stream("POST", "/v1/chat/completions", json=chat | {"stream": True}) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert lines[0].startswith("data: {") and lines[-1] == "data: [DONE]"
    # the server's own refusals come through as they are
    refused = rig.http.post("/v1/completions", json=plain | {"echo": True})
    assert refused.status_code == 400 and "echo" in refused.text
    assert rig.http.post("/v1/completions", json=plain | {"surprise": 1}).status_code == 422


def test_a_cartridge_that_is_not_there_is_a_404_with_those_that_are(rig: Rig) -> None:
    assert rig.put("there", upload_bytes()).is_success
    answer = rig.complete("absent")
    assert answer.status_code == 404
    assert re.search("'absent' is not here; here are: .*there", answer.json()["detail"])
    rig.http.delete("/cartridges/there")


@pytest.mark.parametrize("source", ["huggingface", "wandb"])
def test_the_server_is_not_made_to_unpickle_downloads(rig: Rig, source: str) -> None:
    body = completion() | {"cartridges": [{"id": "someone/something", "source": source}]}
    answer = rig.http.post(COMPLETIONS, json=body)
    assert answer.status_code == 400 and "unpickle" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": 398}, "3 prompt tokens + max_tokens=398"),
        ({"prompt": [1] * 500, "max_tokens": 1}, "limit of 400"),
        ({"n": 5}, "n=5"),
    ],
)
def test_requests_over_the_limits_are_refused(rig: Rig, change: dict[str, Any], words: str) -> None:
    answer = rig.http.post(COMPLETIONS, json=completion() | change)
    assert answer.status_code == 400 and words in answer.json()["detail"]


def test_bodies_over_the_limit_are_refused_announced_or_not(rig: Rig) -> None:
    body = b'{"model": "' + b"x" * 30_000 + b'"}'

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    for content in (body, pieces()):
        answer = rig.http.post(
            COMPLETIONS, content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 413, answer.text
        assert "20000" in answer.json()["detail"]
    assert "Traceback" not in rig.log


def test_more_requests_at_once_than_allowed_are_told_when_to_come_back(rig: Rig) -> None:
    def one(_: int) -> httpx.Response:
        return rig.complete(max_tokens=200, ignore_eos=True)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, range(16)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 6
    assert all(a.headers["Retry-After"] == "1" for a in answers if a.status_code == 429)
    assert rig.metric("completions_in_flight") == 0


def test_metrics_count_requests_and_tokens(rig: Rig) -> None:
    before = rig.metric("tokens_total", "completion")
    answer = rig.complete(max_tokens=4, ignore_eos=True)
    assert answer.json()["usage"]["completion_tokens"] == 4
    assert rig.metric("tokens_total", "completion") == before + 4
    assert rig.metric("requests_total", COMPLETIONS, "200") >= 1
    assert rig.metric("server_up") == 1
    unknown = rig.metric("requests_total", "other", "404")
    rig.http.get("/some/unknown/path")
    assert rig.metric("requests_total", "other", "404") == unknown + 1


def start(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cartridge_distill.gateway", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_it_does_not_start_open_to_the_world(model_folder: Path) -> None:
    model = ["--model", str(model_folder)]
    bare = start(*model)
    assert bare.returncode == 2 and "TOKASAURUS_API_KEY is not set" in bare.stderr
    short = start(*model, TOKASAURUS_API_KEY="secret")
    assert short.returncode == 2 and "only 6 characters" in short.stderr
    assert "secret" not in short.stderr.replace("import secrets; print(secrets", "")
    for host in ("0.0.0.0", "::", "192.168.0.1"):
        open_ = start(*model, "--no-token", "--host", host)
        assert open_.returncode == 2 and f"--no-token with --host {host}" in open_.stderr


def test_nonsense_settings_are_refused_with_their_names(model_folder: Path) -> None:
    done = start(
        *("--model", str(model_folder), "--keep-versions", "0", "--max-disk-gb", "many"),
        TOKASAURUS_API_KEY=TOKEN,
    )
    assert done.returncode == 2
    assert "--keep-versions:" in done.stderr and "--max-disk-gb:" in done.stderr
    done = start("--model", "/nowhere/at-all", TOKASAURUS_API_KEY=TOKEN)
    assert done.returncode == 2 and "/nowhere/at-all" in done.stderr


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}],
    ids=str,
)
def test_on_the_loopback_other_names_are_refused_with_the_token_too(
    rig: Rig, headers: dict[str, str]
) -> None:
    for path in ("/ping", "/v1/models", "/cartridges"):
        answer = rig.http.get(path, headers=headers)
        assert answer.status_code == 403 and "--allow-host" in answer.json()["detail"]
    assert rig.http.get("/cartridges", headers={"Origin": rig.url}).status_code == 200


def test_names_can_be_allowed(start_rig: Any) -> None:
    one = start_rig("--allow-host", "gateway.example", wait=False)

    def asked(name: str) -> int:
        try:
            return one.http.get("/cartridges", headers={"Host": name}).status_code
        except httpx.HTTPError:
            return 0  # not yet

    until(lambda: asked("gateway.example") == 200, "the gateway")
    assert asked("other.example") == 403
