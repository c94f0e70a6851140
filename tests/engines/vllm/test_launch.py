"""Command lines for vLLM, its settings, and how its environment finds this package."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cartridge_distill.engines.vllm import environment
from cartridge_distill.engines.vllm.__main__ import main, parse
from cartridge_distill.engines.vllm.launch import (
    PackagePath,
    ServeCommand,
    check_python,
    served_length,
)
from cartridge_distill.engines.vllm.options import Options
from cartridge_distill.gateway.commands import server_command
from cartridge_distill.gateway.settings import GatewaySettings
from cartridge_distill.util.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def command(*more: str, **changes: Any) -> ServeCommand:
    options = Options(cartridges={"anna": "/carts/anna"})
    plain: dict[str, Any] = {"host": "127.0.0.1", "port": 8000, "more": more}
    return ServeCommand("owner/model", options, **plain | changes)


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_the_stock_line_says_all_that_answers_depend_on() -> None:
    words = shlex.split(command().stock())
    assert words[:3] == ["vllm", "serve", "owner/model"]
    transfer = json.loads(value(words, "--kv-transfer-config"))
    assert transfer["kv_connector"] == "CartridgeConnector"
    assert transfer["kv_load_failure_policy"] == "fail"
    assert Options.read(transfer["kv_connector_extra_config"]).cartridges == {"anna": "/carts/anna"}
    assert value(words, "--middleware").endswith("front.CartridgeFront")
    assert value(words, "--logprobs-mode") == "processed_logprobs"
    assert value(words, "--generation-config") == "vllm"


def test_a_cpu_never_cuts_prompts() -> None:
    assert "--no-enable-chunked-prefill" in command().program(is_cpu=True)
    assert "--no-enable-chunked-prefill" not in command().program(is_cpu=False)


def test_a_cpu_leaves_memory_to_others_unless_told_how_much() -> None:
    words = command().program(is_cpu=True)
    assert value(words, "--kv-cache-memory-bytes") == str(4 * 2**30)
    assert "--kv-cache-memory-bytes" not in command().program(is_cpu=False)
    for more in (("--kv-cache-memory-bytes", "8G"), ("--gpu-memory-utilization=0.5",)):
        words = command(*more).program(is_cpu=True)
        assert str(4 * 2**30) not in words and words[-len(more) :] == list(more)


def test_further_arguments_come_last_and_cannot_undo_ours() -> None:
    assert command("--max-num-seqs", "8").program(is_cpu=True)[-2:] == ["--max-num-seqs", "8"]
    for argument in ("--generation-config=auto", "--kv-transfer-config"):
        with pytest.raises(ConfigError, match=argument.partition("=")[0]):
            command(argument)


def test_the_command_in_the_other_environment_is_understood_there() -> None:
    words = command("--max-num-seqs", "8", max_model_len=512, dtype="float32").own("/env/python")
    assert words[:3] == ["/env/python", "-m", "cartridge_distill.engines.vllm"]
    given = parse(words[3:])
    assert Options.model_validate_json(given.options).cartridges == {"anna": "/carts/anna"}
    assert (given.model, given.host, given.port) == ("owner/model", "127.0.0.1", 8000)
    assert (given.max_model_len, given.dtype) == (512, "float32")
    assert given.more == ["--max-num-seqs", "8"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "one of them"),
        ({"cartridges": {}, "cartridge_dir": "/carts"}, "one of them"),
        ({"cartridge_dir": "carts"}, "absolute"),
        ({"cartridges": {"a": "carts"}}, "absolute"),
        ({"cartridge_dir": "/carts", "colour": 1}, "colour"),
        ({"cartridge_dir": "/carts", "resident_gb": 0}, "resident_gb"),
    ],
)
def test_settings_that_cannot_work_are_named(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Options.read(given)


def test_the_context_bounds_the_length(model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    reach = config["max_position_embeddings"]
    assert served_length(str(model_folder), reach + 1) == reach
    assert served_length(str(model_folder), reach - 1) == reach - 1
    assert served_length(str(model_folder), None) is None


def test_another_python_finds_this_package_and_nothing_beside_it(tmp_path: Path) -> None:
    package = PackagePath()
    script = "import sys, cartridge_distill as c; print(*sys.path, c.__file__, sep=chr(10))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=package.environment({"PYTHONPATH": str(ROOT)}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *path, found = done.stdout.split()
    assert str(ROOT) not in path and found.startswith(package.path)
    package.remove()
    assert not Path(package.path).exists() and (ROOT / "cartridge_distill").is_dir()


def test_the_python_of_the_environment_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="--make-environment"):
        check_python(None)
    with pytest.raises(ConfigError, match="/no/python"):
        check_python("/no/python")
    assert check_python(sys.executable) == sys.executable


def test_the_gateway_starts_vllm_with_its_own_bounds(tmp_path: Path) -> None:
    settings = GatewaySettings(
        model="owner/model",
        backend="vllm",
        engine_python=sys.executable,
        cartridge_dir=tmp_path,
        max_request_tokens=100,
        max_cartridge_tokens=64,
        server_args=("--max-num-seqs", "8"),
    )
    given = parse(server_command(settings, 4711)[3:])
    options = Options.model_validate_json(given.options)
    assert options.cartridge_dir == tmp_path and options.max_tokens_per_request == 100
    assert (given.port, given.max_model_len, given.more) == (4711, 164, ["--max-num-seqs", "8"])


@pytest.mark.parametrize(
    "given",
    [
        {"backend": "vllm"},
        {"backend": "embedded", "engine_python": "/env/python"},
        {"backend": "vllm", "engine_python": "/p", "allow_remote_cartridges": True},
    ],
)
def test_gateway_settings_that_do_not_go_together(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="engine_python|allow_remote_cartridges"):
        GatewaySettings(model="owner/model", **given)


def test_without_vllm_the_command_says_how_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "owner/model", "--cartridge", "anna=/carts/anna"]) == 2
    assert "--make-environment" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "pins"), [("vllm-cpu", environment.CPU), ("vllm-cuda", environment.CUDA)]
)
def test_the_environment_is_what_the_requirements_say(name: str, pins: tuple[str, ...]) -> None:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    assert tuple(line for line in lines if not line.startswith("#")) == pins
