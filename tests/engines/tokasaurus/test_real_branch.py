"""The REAL branch with the repairs, as far as a machine without a GPU goes.

Skipped unless told where it is. In an environment of its own (the branch pins old versions)::

    git clone -b geoff/cartridges https://github.com/ScalingIntelligence/tokasaurus
    git -C tokasaurus checkout 845f115f5bc38aee266821a094fba1cd702dafff
    python3.11 -m venv real && real/bin/pip install torch==2.6.0 transformers==4.53.0 \\
        pydra-config accelerate art statsd fastapi tabulate uvicorn 'openai<2' loguru wandb \\
        python-multipart psutil requests typer \\
        aiohttp httptools prometheus-client tenacity uvloop
    TOKASAURUS_SOURCE=$PWD/tokasaurus TOKASAURUS_PYTHON=$PWD/real/bin/python \\
        pytest tests/engines/tokasaurus/test_real_branch.py

It ran with torch 2.13 for CPUs in the place of 2.6, too. flashinfer is stood in for where it is not
installed (``stand_ins``). The checkout stays as it is: the patch goes onto a copy, and each check
runs in a process of its own on one or the other.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.engines.tokasaurus import guard
from cartridge_distill.engines.tokasaurus.launch import CHILD_ENDED
from cartridge_distill.rollout.fingerprint import decode_fingerprint
from cartridge_distill.sync.http import HttpPublisher
from cartridge_distill.sync.versions import version_id
from tests.gateway.rig import TOKEN, until
from tests.tiny import plain_logprobs, random_cartridge, save_model, tiny_model, write_cartridge
from verl_patches.manage import main

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[2]
SOURCE = os.environ.get("TOKASAURUS_SOURCE")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not SOURCE,
        reason="TOKASAURUS_SOURCE is not set to a checkout of the branch; how to run it stands at "
        "the top of this file",
    ),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The branch as it comes: a folder that holds ``tokasaurus/``. Not to be written to."""
    root = tmp_path_factory.mktemp("plain")
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(str(SOURCE)) / "tokasaurus", root / "tokasaurus", ignore=without)
    return root


@pytest.fixture(scope="module")
def repaired(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the patch on, by the real command. Not to be written to."""
    root = tmp_path_factory.mktemp("repaired")
    shutil.copytree(plain / "tokasaurus", root / "tokasaurus")
    assert patch("apply", root) == 0
    return root


def patch(command: str, root: Path) -> int:
    return main([command, "--package", "tokasaurus", "--target", str(root)])


def environment(source: Path) -> dict[str, str]:
    stand_ins = [] if importlib.util.find_spec("flashinfer") else [str(HERE / "stand_ins")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(source), *stand_ins, str(PROJECT)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def python() -> str:
    return os.environ.get("TOKASAURUS_PYTHON", sys.executable)


def check(name: str, source: Path) -> Any:
    """The result of one of ``real_checks`` on these sources, or what it raised."""
    done = subprocess.run(
        [python(), "-m", "tests.engines.tokasaurus.real_checks", name],
        env=environment(source),
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout.splitlines()[-1])


def sources(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.py")}


def test_the_branch_is_the_known_one_and_the_patch_goes_on_and_off(
    plain: Path, repaired: Path, tmp_path: Path
) -> None:
    assert guard.sources_sha256(plain / "tokasaurus") == guard.PLAIN
    assert guard.sources_sha256(repaired / "tokasaurus") == guard.REPAIRED
    shutil.copytree(repaired / "tokasaurus", tmp_path / "tokasaurus")
    assert patch("apply", tmp_path) == patch("check", tmp_path) == 0
    assert patch("revert", tmp_path) == 0 and patch("check", tmp_path) == 1
    assert sources(tmp_path) == sources(plain)


@pytest.mark.parametrize(("which", "code"), [("repaired", 0), ("plain", 1)])
def test_the_command_tells_whether_the_repairs_are_on(
    which: str, code: int, request: pytest.FixtureRequest
) -> None:
    done = subprocess.run(
        [python(), "-m", "cartridge_distill.engines.tokasaurus", "--check"],
        env=environment(request.getfixturevalue(which)),
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr


def test_unrepaired_it_runs_dry_at_version_65(plain: Path) -> None:
    result = check("runs_dry", plain)
    assert result["step"] == 65 and result["error"].startswith("Could not pick 128 blocks")


def test_repaired_a_thousand_versions_pass(repaired: Path) -> None:
    assert check("runs_dry", repaired) == {"step": None}
    assert check("thousand_versions", repaired)["versions"] == 1_000


def test_repaired_random_interleavings_lose_nothing(plain: Path, repaired: Path) -> None:
    result = check("random_interleavings", repaired)
    assert result["started"] > 1_000 and result["refused"] > 10
    assert "AssertionError" in check("random_interleavings", plain)


def test_a_cartridge_in_use_needs_no_room_once_more(plain: Path, repaired: Path) -> None:
    assert check("full_cache_with_a_cartridge_in_use", plain) == {"fits": False}
    assert check("full_cache_with_a_cartridge_in_use", repaired) == {"fits": True}


def test_an_evicted_id_is_read_from_its_file_again(plain: Path, repaired: Path) -> None:
    name = "evicted_id_of_one_block_comes_back"
    assert check(name, plain) == {"read": [[1.0], [2.0], [3.0], [-1.0]]}, "a wrong read"
    assert check(name, repaired) == {"read": [[1.0], [2.0], [3.0], [1.0]]}
    assert check("evicted_id_comes_back", repaired) == {"wrong": []}


def test_parameters_in_a_file_do_not_stay_in_memory(plain: Path, repaired: Path) -> None:
    assert check("parameters_in_a_file", plain) == {"cache_hangs_on_parameters": True}
    assert check("parameters_in_a_file", repaired) == {"cache_hangs_on_parameters": False}


def test_what_cannot_be_served_is_refused(repaired: Path) -> None:
    answers = check("requests_that_cannot_be_served", repaired)
    assert answers["fine"] == answers["before"] == "accepted"
    assert "multiple of 16" in answers["odd"]
    assert "has been deleted" in answers["deleted"] and "never uploaded" in answers["never"]
    assert "named twice" in answers["twice"]


def test_answered_requests_are_forgotten(plain: Path, repaired: Path) -> None:
    assert check("answers_are_forgotten", plain) == {"kept": 1}
    assert check("answers_are_forgotten", repaired) == {"kept": 0}


# --- the whole server, on a CPU -----------------------------------------------------------------

CARTRIDGE = 64
CACHE = 1_024
DEBUG_FILE = Path("/tmp/tokasaurus_layer_0_hidden_states.pt")
"""Where the branch writes at each forward; no option moves it."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, as the branch's older transformers reads it, and a folder for cartridges."""
    directory = tmp_path_factory.mktemp("real")
    save_model(tiny_model(), directory / "model")
    settings = directory / "model" / "tokenizer_config.json"
    text = re.sub(r'"tokenizer_class": "\w+"', '"tokenizer_class": "PreTrainedTokenizerFast"',
                  settings.read_text())  # fmt: skip
    settings.write_text(text)
    (directory / "cartridges").mkdir()
    return directory


@contextmanager
def serving(
    files: Path, source: Path, *options: str
) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = files / "log"
    with log.open("w") as written:
        process = subprocess.Popen(
            [
                *(python(), "-m", "tests.engines.tokasaurus.real_server", *options),
                *(f"model={files / 'model'}", f"port={port}"),
                *(f"cartridge_dir={files / 'cartridges'}", f"kv_cache_num_tokens={CACHE}"),
                *("max_num_tokens_per_request=200", "use_cudagraphs=False", "dtype=float32"),
                *("max_tokens_per_forward=256", "max_seqs_per_forward=32"),
            ],
            env=environment(source),
            cwd=PROJECT,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            deadline = time.monotonic() + 400
            while True:
                assert process.poll() is None, log.read_text()[-4000:]
                try:
                    client.get("/ping")
                    break
                except httpx.ConnectError:
                    assert time.monotonic() < deadline, log.read_text()[-4000:]
                    time.sleep(0.2)
            yield process, client
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def ask(client: httpx.Client, *ids: str, prompt: tuple[int, ...] = (65, 66, 67)) -> httpx.Response:
    body = {
        "model": "default",
        "prompt": list(prompt),
        "max_tokens": 6,
        "temperature": 1.0,
        "ignore_eos": True,
        "logprobs_in_fingerprint": True,
        "cartridges": [{"id": name, "source": "local"} for name in ids],
    }
    return client.post("/custom/cartridge/completions", json=body)


def error_of(answer: httpx.Response, version: int, prompt: tuple[int, ...]) -> float:
    """Greatest difference to the log-probs of a plain forward with this version's cartridge."""
    model = tiny_model()
    prefix = random_cartridge(model, CARTRIDGE, seed=version).prefix()
    (completion,) = decode_fingerprint(answer.json()["system_fingerprint"], ["stop"])
    expected = plain_logprobs(model, prefix, list(prompt), completion.token_ids)
    assert completion.logprobs is not None
    return max(abs(a - b) for a, b in zip(completion.logprobs, expected, strict=True))


def publish(files: Path, version: int) -> str:
    name = f"v{version}"
    write_cartridge(random_cartridge(tiny_model(), CARTRIDGE, version), files / "cartridges", name)
    return name


def test_the_whole_server_serves_each_version_with_its_own_weights(
    files: Path, repaired: Path
) -> None:
    """Sixty versions through room for sixteen; then old ones again, and what is refused."""
    long = tuple(range(40, 80))
    DEBUG_FILE.unlink(missing_ok=True)
    with serving(files, repaired) as (process, client):
        for version in range(60):
            name = publish(files, version)
            for prompt in ((65, 66, 67), long, long):
                answer = ask(client, name, prompt=prompt)
                assert answer.status_code == 200, answer.text
                assert error_of(answer, version, prompt) < 1e-3, (version, prompt)
        for version in (0, 59, 7, 0, 30):
            answer = ask(client, f"v{version}", prompt=long)
            assert error_of(answer, version, long) < 1e-3, version
        # Twenty versions at once, of which sixteen would fit, with prompts that begin alike.
        rng = random.Random(0)
        asked = [
            (rng.randrange(40, 60), rng.choice([long, long[:33] + (1, 2), (65, 66, 67)]))
            for _ in range(80)
        ]
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda it: ask(client, f"v{it[0]}", prompt=it[1]), asked))
        for (version, prompt), answer in zip(asked, answers, strict=True):
            assert error_of(answer, version, prompt) < 1e-3, (version, prompt)
        (files / "cartridges" / "v1" / "cartridge.pt").unlink()
        for ids, said in ((["v1"], "has been deleted"), (["v2", "v2"], "named twice")):
            answer = ask(client, *ids)
            assert answer.status_code == 400 and said in answer.text
        assert ask(client, "v59").status_code == 200
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(30) == 0
        assert not psutil.wait_procs(children, timeout=20)[1]
    assert not DEBUG_FILE.exists(), "hidden states are written at each forward"


def test_without_the_patch_the_server_does_not_start(files: Path, plain: Path) -> None:
    with pytest.raises(AssertionError, match="lacks the repairs"), serving(files, plain):
        pass


def test_unrepaired_the_whole_server_ends_with_a_reason(files: Path, plain: Path) -> None:
    with serving(files, plain, "--unrepaired") as (process, client):
        with pytest.raises(httpx.RemoteProtocolError):
            for version in range(100, 130):
                assert ask(client, publish(files, version)).status_code == 200
        assert process.wait(30) == CHILD_ENDED
    log = (files / "log").read_text()
    assert re.search(r"Could not pick \d+ blocks", log)
    assert re.search(r"process manager \(pid \d+\) ended", log)
    assert DEBUG_FILE.exists(), "or the test above shows nothing"
    DEBUG_FILE.unlink()


@pytest.mark.parametrize("name", ["manager", "model_worker"])
def test_a_process_that_dies_ends_the_whole_server(files: Path, repaired: Path, name: str) -> None:
    with serving(files, repaired) as (process, client):
        assert ask(client, publish(files, 200 + len(name))).status_code == 200
        (pid,) = re.findall(rf"process {name} has pid (\d+)", (files / "log").read_text())
        os.kill(int(pid), signal.SIGKILL)
        assert process.wait(30) == CHILD_ENDED
    said = f"process {name} (pid {pid}) ended with exit code -9"
    assert said in (files / "log").read_text()


# --- the gateway in front of it -----------------------------------------------------------------


@contextmanager
def gateway(files: Path, source: Path, *options: str) -> Iterator[HttpPublisher]:
    """The gateway over the real server; what it yields uploads to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = files / "gateway.log"
    with log.open("w") as written:
        process = subprocess.Popen(
            [
                *(
                    python(),
                    "-m",
                    "tests.engines.tokasaurus.real_gateway",
                    "--backend",
                    "tokasaurus",
                ),
                *("--model", str(files / "model"), "--model-name", "tiny", "--port", str(port)),
                *("--cartridge-dir", str(files / "uploaded"), "--max-request-tokens", "200"),
                *("--kv-cache-tokens", str(CACHE), "--max-cartridge-tokens", "128", *options),
                *("--", "use_cudagraphs=False", "dtype=float32", "max_tokens_per_forward=256"),
                "max_seqs_per_forward=32",
            ],
            env=environment(source) | {"TOKASAURUS_API_KEY": TOKEN},
            cwd=PROJECT,
            stdout=written,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:

        def up() -> bool:
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                return httpx.get(url + "/ping", timeout=5).status_code == 200
            except httpx.ConnectError:
                return False

        until(up, "the gateway and the real server", timeout_s=400)
        yield HttpPublisher([url], "tiny")
        process.terminate()
        assert process.wait(60) == 0, log.read_text()[-4000:]
    finally:
        process.kill()
        process.wait()


def upload_and_ask(publisher: HttpPublisher, versions: range) -> None:
    """Each version is uploaded, asked, and has to be the one that answered."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=publisher.urls[0], headers=headers, timeout=120) as client:
        for number in versions:
            cartridge = random_cartridge(tiny_model(), CARTRIDGE, number)
            version = version_id("run", number)
            publisher.publish(version, Snapshot.take(cartridge.state_dict(), torch.float32))
            answer = ask(client, version)
            assert answer.status_code == 200, answer.text
            assert error_of(answer, number, (65, 66, 67)) < 1e-3, version


def restarts(publisher: HttpPublisher, reason: str) -> float:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    text = httpx.get(publisher.urls[0] + "/metrics", headers=headers).text
    name = f'cartridge_gateway_server_restarts_total{{reason="{reason}"}} '
    return sum(float(line.removeprefix(name)) for line in text.splitlines() if name in line)


def test_behind_the_gateway_versions_come_and_go(
    files: Path, repaired: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKASAURUS_API_KEY", TOKEN)
    with gateway(files, repaired) as publisher:
        upload_and_ask(publisher, range(40))  # room for sixteen
        assert restarts(publisher, "died") == restarts(publisher, "pages") == 0
        # the manager dies, the launcher ends the server, the gateway starts it again
        pids = re.findall(r"process manager has pid (\d+)", (files / "gateway.log").read_text())
        os.kill(int(pids[-1]), signal.SIGKILL)
        upload_and_ask(publisher, range(40, 45))
        assert restarts(publisher, "died") == 1


def test_the_second_defence_lets_the_unrepaired_branch_live(
    files: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKASAURUS_API_KEY", TOKEN)
    with gateway(files, plain, "--defence", "restart") as publisher:
        upload_and_ask(publisher, range(100, 130))  # unrepaired, it dies at the twentieth
        assert restarts(publisher, "died") == 0
        assert restarts(publisher, "pages") == 3  # half of the cache holds eight
